"""Owns how single values of the cluster YAML are written: sizes, addresses, devices, endpoints."""

import re
from dataclasses import dataclass
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)")
_SIZE_FIX = "Write a whole number of bytes, or a number and a unit such as 256MiB or 2GB."
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
_ADDRESS_FIX = "Write host:port, for instance 127.0.0.1:50051; port 0 takes any free port."
_DEVICE_PATTERN = r"^(cpu|cuda:[0-9]{1,3})$"


@dataclass(frozen=True, slots=True)
class Address:
    """An address to listen on. Port 0 stands for any free port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_bytes(value: object) -> object:
    """Returns the number of bytes of ``"256MiB"`` or ``"2GB"``; whole numbers pass through."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].upper() not in _UNITS:
        _refuse("is not a size in bytes", _SIZE_FIX)
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_address(value: object) -> Address:
    """Reads ``host:port`` or ``[ipv6]:port``."""
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[3]) > 65535:
        _refuse("is not host:port", _ADDRESS_FIX)
    return Address(match[1] or match[2], int(match[3]))


def _check_device(value: str) -> str:
    if re.match(_DEVICE_PATTERN, value) is None:
        _refuse("is not a device", "Write cpu, or cuda:0 for the first GPU of a node.")
    return value


def _check_ray_address(value: str) -> str:
    if value not in ("local", "auto") and _ADDRESS.fullmatch(value) is None:
        _refuse("is not the address of a Ray cluster", "Write local, auto, or host:port of the head node.")
    return value


def _check_model_path(value: str) -> str:
    if not value or "\0" in value or "://" in value:
        _refuse("is not a directory", "Download the model first, then give the directory it lies in.")
    return value


def _check_endpoint(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        _refuse("is not the address of an OTLP receiver", "Write it as http://127.0.0.1:4317.")
    return value


def _refuse(problem: str, fix: str) -> NoReturn:
    """Refuses a value inside a validator; pydantic collects the refusal with the others."""
    raise PydanticCustomError("refused", "{problem}", {"problem": problem, "fix": fix})


WorkerName = Annotated[str, Field(pattern="^[A-Za-z0-9_.-]{1,64}$", examples=["big", "old-desktop"])]
ByteSize = Annotated[
    int,
    Field(ge=1, le=2**50),
    BeforeValidator(parse_bytes, json_schema_input_type=int | str),
    Field(examples=["256MiB", "2GB"]),
]
AddressText = Annotated[
    Address,
    PlainValidator(parse_address, json_schema_input_type=str),
    Field(examples=["127.0.0.1:50051", "0.0.0.0:50051"]),
]
Device = Annotated[
    str,
    AfterValidator(_check_device),
    Field(json_schema_extra={"pattern": _DEVICE_PATTERN}, examples=["cpu", "cuda:0"]),
]
RayAddress = Annotated[str, AfterValidator(_check_ray_address), Field(examples=["local", "auto", "10.0.0.1:6379"])]
ModelPath = Annotated[str, AfterValidator(_check_model_path), Field(examples=["demo", "/models/llama"])]
Endpoint = Annotated[str, AfterValidator(_check_endpoint), Field(examples=["http://127.0.0.1:4317"])]
