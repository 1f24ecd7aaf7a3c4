"""The threads that share the work of compiled code: those of torch's own OpenMP runtime.

Between torch's operations they spin for the next piece of work: a second pool would compete with them for the same
cores.
"""

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

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
def _openmp_parallel() -> Callable[[int, bytes, int, int], None] | None:
    """``GOMP_parallel(function, argument, num_threads, flags)`` of torch's OpenMP runtime, or None without one.

    Not public to torch, but what every compiled ``omp parallel`` of GCC calls; LLVM's runtime has it too.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    # Looked up through torch's own library, so that it is the runtime that torch runs on, wherever that lies.
    parallel = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None) if library.exists() else None
    if parallel is None:
        logger.warning("no_openmp library=%s effect=%r", library, "compiled code runs on one thread")
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel  # type: ignore[no-any-return]
