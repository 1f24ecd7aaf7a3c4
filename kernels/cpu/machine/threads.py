"""Runs compiled code on the threads of torch's own OpenMP runtime.

Between torch's operations these threads spin while they wait for the next one, so a second pool of threads would
compete with them for the same cores.
"""

import ctypes
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

Operation = tuple[int, bytes]
"""The address of a C function, and its packed arguments. Every thread calls the function with their address."""

_NAMES = ("GOMP_parallel", "omp_get_num_threads", "omp_set_num_threads")
_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def run(function: int, arguments: bytes, num_threads: int) -> None:
    """Calls the C function at an address on ``num_threads`` threads, of which this is one, with the same arguments.

    It releases the interpreter's lock.
    """
    parallel = _openmp_parallel() if num_threads > 1 else None
    if parallel is None:
        _C_FUNCTION(function)(arguments)
    else:
        parallel(function, arguments, num_threads, 0)


@cache
def team_size() -> int:
    """Returns the address of the C function that tells how many threads :func:`run` uses; 0 where that is always 1.

    They may be fewer than were asked for.
    """
    library = _openmp()
    return 0 if library is None else address(library.omp_get_num_threads)


def address(function: Any) -> int:
    """Returns the address of a C function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def work_alone() -> None:
    """Keeps torch from using other threads for the calling thread, and lets this one run on any core of the process.

    For background threads, which would otherwise get a second team of threads on the cores of those that compute.
    """
    torch.get_num_threads()  # torch sets a thread up on its first use, which must not come later
    library = _openmp()
    if library is not None:
        library.omp_set_num_threads(1)
    os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))


@cache
def _openmp_parallel() -> Callable[[int, bytes, int, int], None] | None:
    """Returns ``GOMP_parallel(function, argument, num_threads, flags)`` of torch's OpenMP runtime; None without one.

    It is no public part of torch, but every ``omp parallel`` that GCC compiles calls it, and LLVM's runtime has it too.
    """
    library = _openmp()
    if library is None:
        return None
    parallel = library.GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _openmp() -> ctypes.CDLL | None:
    """Loads the OpenMP runtime that torch uses, which is looked up through torch's own library; None without one."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = ctypes.CDLL(str(path)) if path.exists() else None
    if library is None or not all(hasattr(library, name) for name in _NAMES):
        logger.warning("no_openmp library=%s effect=%r", path, "compiled code runs on one thread")
        return None
    return library
