"""Reads the headers of safetensors files, and compares tensors in them without holding either in memory.

The library reads no bfloat16 without torch, and says not where a tensor lies; so the header is read here, once the
library has found it sound.
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from orchestrator.model_dir.directory import inside, readable
from placement.errors import InvalidModel
from placement.model.checkpoint_files import FIX_AGAIN, is_lfs_pointer, lfs_pointer

_POINTER_BYTES = 256
_LENGTH_BYTES = 8
_BLOCK_ELEMENTS = 1 << 21
_NUM_SAMPLES, _SAMPLE_ELEMENTS = 64, 1 << 12
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        dtype: its number type, as safetensors names it.
        file: the file that it is in.
        version: changes when the file does.
        offset: where in the file it begins.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    version: tuple[int, int]
    offset: int

    @property
    def num_elements(self) -> int:
        """Counts its elements."""
        return int(np.prod(self.shape, dtype=np.int64))


def read_header(directory: Path, name: str) -> dict[str, StoredTensor]:
    """Reads the tensors of a safetensors file; the library checks sizes, overlaps and the file's length."""
    path = inside(directory, name)
    try:
        with readable(path), path.open("rb") as file, safe_open(path, framework="numpy"):
            num_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(num_bytes))
            status = os.fstat(file.fileno())
    except SafetensorError as error:
        with readable(path), path.open("rb") as file:
            if is_lfs_pointer(file.read(_POINTER_BYTES)):
                raise lfs_pointer(name) from None
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise InvalidModel(field=name, problem=f"is damaged or truncated: {reason}", fix=FIX_AGAIN) from None
    return {
        key: StoredTensor(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            file=path,
            version=(status.st_mtime_ns, status.st_size),
            offset=_LENGTH_BYTES + num_bytes + entry["data_offsets"][0],
        )
        for key, entry in header.items()
        if key != "__metadata__"
    }


@lru_cache(maxsize=16)
def are_equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Tells whether two tensors have the same numbers.

    Some places all over them are compared first, which nearly always shows a difference at once. Then all is read, as
    it is again when the model loads; of a vocabulary of 128,000 rows of 4096 in 16 bits that is twice 1 GB.
    """
    if first.shape != second.shape or first.dtype not in _ITEM_BYTES or second.dtype not in _ITEM_BYTES:
        return False
    total = first.num_elements
    step = max(1, total // _NUM_SAMPLES)
    samples = [(start, _SAMPLE_ELEMENTS) for start in range(0, total, step)]
    blocks = [(start, _BLOCK_ELEMENTS) for start in range(0, total, _BLOCK_ELEMENTS)]
    with readable(first.file), first.file.open("rb") as one, second.file.open("rb") as other:
        for start, most in [*samples, *blocks]:
            num = min(most, total - start)
            if first.dtype == second.dtype:
                same = _read(one.fileno(), first, start, num) == _read(other.fileno(), second, start, num)
            else:
                left, right = (
                    _numbers(_read(file.fileno(), tensor, start, num), tensor.dtype)
                    for file, tensor in ((one, first), (other, second))
                )
                same = bool(np.array_equal(left, right))
            if not same:
                return False
    return True


def _read(file: int, tensor: StoredTensor, start: int, num_elements: int) -> bytes:
    item = _ITEM_BYTES[tensor.dtype]
    return os.pread(file, num_elements * item, tensor.offset + start * item)


def _numbers(data: bytes, dtype: str) -> NDArray[np.float32]:
    """Returns numbers as float32, which holds those of all three types exactly."""
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float32 if dtype == "F32" else np.float16).astype(np.float32)
