"""C functions out of what Numba compiles."""

# mypy: disallow-any-unimported=False

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numba import cfunc

_KEPT: list[Any] = []  # code lives as long as its object


def c_function(signature: Any, entry: Callable[[int], Callable[..., Any]], sources: Sequence[str]) -> int:
    """Address of a C function, from Numba's cache on disk where that can be written.

    Args:
        entry: makes the function; the number that it is given must be a part of its closure, by which the cache knows
            the code of these sources from that of others.
        sources: files that the code is made of, constants of theirs too.
    """
    version = int.from_bytes(hashlib.sha256(b"".join(Path(file).read_bytes() for file in sources)).digest()[:4])
    try:
        callback = cfunc(signature, cache=True)(entry(version))
    except RuntimeError as error:
        if "cache" not in str(error):
            raise
        callback = cfunc(signature)(entry(version))  # neither beside the source nor in the user's own cache directory
    _KEPT.append(callback)
    return int(callback.address)
