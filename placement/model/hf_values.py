"""Reads single values of ``config.json``, and refuses those that cannot be right. ``null`` counts as absent."""

import math
from collections.abc import Mapping

from placement.errors import InvalidModel

FIX_EXPORT = "Use the config.json that was saved with the model."
MAX_CONTEXT = 1 << 27

Config = Mapping[str, object]

_REQUIRED = object()


def whole_number(values: Config, key: str, *, maximum: int, default: int | None = None, where: str = "") -> int:
    """Reads an integer from 1 to ``maximum``, which may be absent where there is a default.

    ``where`` is the dotted name of the object that has the key; it is empty for the whole file.
    """
    value = _get(values, key, _REQUIRED if default is None else default, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise refusal(_dotted(where, key), value, "is not a whole number")
    if not 1 <= value <= maximum:
        raise refusal(_dotted(where, key), value, f"is not between 1 and {maximum}")
    return value


def positive(
    values: Config, key: str, *, maximum: float = 1e12, default: float | None = None, where: str = ""
) -> float:
    """Reads a number above 0 and at most ``maximum``, which may be absent where there is a default."""
    value = _get(values, key, _REQUIRED if default is None else default, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refusal(_dotted(where, key), value, "is not a number")
    if not (math.isfinite(value) and 0 < value <= maximum):
        raise refusal(_dotted(where, key), value, f"is not above 0 and at most {maximum:g}")
    return float(value)


def flag(values: Config, key: str, *, default: bool = False, where: str = "") -> bool:
    """Reads true or false."""
    value = _get(values, key, default, where)
    if not isinstance(value, bool):
        raise refusal(_dotted(where, key), value, "is not true or false")
    return value


def section(values: Config, key: str, where: str = "") -> Config:
    """Reads an object; it is empty where it is absent."""
    value = _get(values, key, {}, where)
    if not isinstance(value, Mapping):
        raise refusal(_dotted(where, key), value, "is not an object")
    return value


def refusal(key: str, value: object, problem: str, fix: str = FIX_EXPORT, file: str = "config.json") -> InvalidModel:
    """Makes the error that names ``key`` of ``file``."""
    return InvalidModel(field=f"{file}: {key}", value=value, problem=problem, fix=fix)


def _get(values: Config, key: str, default: object, where: str) -> object:
    value = values.get(key)
    if value is not None:
        return value
    if default is _REQUIRED:
        raise refusal(_dotted(where, key), None, "is missing")
    return default


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
