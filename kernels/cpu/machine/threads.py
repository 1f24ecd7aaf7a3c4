"""The threads that share the work of compiled code: those of torch's own OpenMP runtime.

Between torch's operations they spin for the next piece of work: a second pool would compete with them for the same
cores.
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

_NAMES = ("GOMP_parallel", "omp_get_num_threads", "omp_set_num_threads")
_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


def run(work: int, job: bytes, num_threads: int) -> None:
    """Lets ``num_threads`` threads call the C function at ``work`` with ``job``, this one among them.

    Releases the interpreter's lock.
    """
    parallel = _openmp_parallel() if num_threads > 1 else None
    if parallel is None:
        _C_FUNCTION(work)(job)
    else:
        parallel(work, job, num_threads, 0)


@cache
def team_size() -> int:
    """Address of the C function that says how many threads :func:`run` has called; 0 where that is one, always.

    They may be fewer than were asked for.
    """
    library = _openmp()
    return 0 if library is None else address(library.omp_get_num_threads)


def address(function: Any) -> int:
    """Where a C function is."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def work_alone() -> None:
    """Has torch's operations on the calling thread use no other thread, and this one run on any core of the process.

    For threads that work beside those that compute, whose team and cores they would otherwise double and share.
    """
    torch.get_num_threads()  # what torch sets a thread up with on its first use, so that it does not later
    library = _openmp()
    if library is not None:
        library.omp_set_num_threads(1)
    os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))


@cache
def _openmp_parallel() -> Callable[[int, bytes, int, int], None] | None:
    """``GOMP_parallel(function, argument, num_threads, flags)`` of torch's OpenMP runtime, or None without one.

    Not public to torch, but what every compiled ``omp parallel`` of GCC calls; LLVM's runtime has it too.
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
    """The runtime that torch runs on, wherever that lies: it is looked up through torch's own library."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = ctypes.CDLL(str(path)) if path.exists() else None
    if library is None or not all(hasattr(library, name) for name in _NAMES):
        logger.warning("no_openmp library=%s effect=%r", path, "compiled code runs on one thread")
        return None
    return library
