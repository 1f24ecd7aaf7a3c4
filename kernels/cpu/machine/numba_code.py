"""Makes C functions of code that Numba compiles, for the same target as all other code."""

# mypy: disallow-any-unimported=False

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numba import cfunc, config

from kernels.cpu.machine.target import compiled_for, is_forced

if is_forced():  # Numba reads them when it first compiles
    config.CPU_NAME, config.CPU_FEATURES = compiled_for()

_KEPT: list[Any] = []  # compiled code lives as long as its Python object


def c_function(signature: Any, entry: Callable[[int], Callable[..., Any]], sources: Sequence[str]) -> int:
    """Compiles a C function, or loads it from Numba's cache on disk where that can be written; returns its address.

    Args:
        entry: makes the function to compile. The number that it is given, a hash of the sources, must be part of the
            function's closure, so that the cache does not return code of other sources.
        sources: the files that the code and its constants come from.
    """
    version = int.from_bytes(hashlib.sha256(b"".join(Path(file).read_bytes() for file in sources)).digest()[:4])
    try:
        callback = cfunc(signature, cache=True)(entry(version))
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        callback = cfunc(signature)(
            entry(version)
        )  # Numba can write neither beside the source nor in the user's cache directory
    _KEPT.append(callback)
    return int(callback.address)
