"""Decode attention over a paged KV cache: every sequence of a step in one call, its KV read where it lies.

Owns how a step's decodes are laid out for :mod:`kernels.simd`, and the threads that share the work. They are
those of torch's own OpenMP runtime, which between torch's operations spin for the next piece of work: a second
pool would compete with them for the same cores.

B sequences; other shapes as in :mod:`kernels.reference`.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels import simd
from kernels.attention import DecodePlan, LayerCache, SequenceSpan

_C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_COMPILED = {torch.float32: simd.work_float32, torch.bfloat16: simd.work_bfloat16}


def plan_decodes(spans: Sequence[SequenceSpan]) -> DecodePlan:
    """Lays out spans of one query each, of which there is at least one."""
    assert spans and all(span.num_queries == 1 for span in spans), spans
    runs = np.fromiter(chain.from_iterable(chain.from_iterable(span.runs for span in spans)), np.int64).reshape(-1, 2)
    lengths = runs[:, 1] - runs[:, 0]
    ends = lengths.cumsum()
    slots = np.arange(ends[-1]) + np.repeat(runs[:, 1] - ends, lengths)
    last_run = np.fromiter((len(span.runs) for span in spans), np.int64).cumsum() - 1
    first_token = np.concatenate(([0], ends[last_run]))
    num_tiles = -(-np.diff(first_token) // simd.TILE)
    rows = np.fromiter((span.query_start for span in spans), np.int64)
    first_tile = np.concatenate(([0], num_tiles.cumsum()))
    tile_sequence = np.repeat(np.arange(len(spans), dtype=np.int32), num_tiles)
    slots = slots.astype(np.int32)
    arrays = rows, first_token, first_tile, slots, tile_sequence  # in the order of simd.JOB
    return DecodePlan(
        rows=rows,
        slots=slots,
        first_token=first_token,
        first_tile=first_tile,
        tile_sequence=tile_sequence,
        addresses=(len(tile_sequence), *(array.ctypes.data for array in arrays)),
    )


def supports(cache: LayerCache) -> bool:
    """Whether :func:`decode` can read the cache: its heads are whole vectors."""
    return cache.keys.shape[-1] % simd.LANES == 0 and cache.keys.dtype in _COMPILED


def decode(query: Tensor, cache: LayerCache, plan: DecodePlan, scale: float, output: Tensor) -> None:
    """Attention of each planned row of ``query`` [T, H, D] over its sequence, to the same row of ``output``.

    Sums are float32. The first call for a dtype compiles it, or loads it from Numba's cache on disk.
    """
    keys, values, query = cache.keys, cache.values, query.contiguous()
    num_kv_heads, num_slots, head_dim = keys.shape
    group = query.shape[1] // num_kv_heads
    assert keys.is_contiguous() and values.is_contiguous() and output.is_contiguous()
    assert query.dtype == keys.dtype == values.dtype == output.dtype
    num_tasks = len(plan.tile_sequence) * num_kv_heads
    padded_group = group if group < 3 else -(-group // 4) * 4
    partials = torch.empty(num_tasks * padded_group * (head_dim + 2))
    tickets = torch.zeros(1 + len(plan.rows) * num_kv_heads, dtype=torch.int64)
    tensors = (query, keys, values, output, partials, tickets)
    job = simd.JOB.pack(
        num_kv_heads, group, head_dim, num_slots, *[x.data_ptr() for x in tensors], *plan.addresses, scale
    )
    _run(_compiled(query.dtype), job, min(torch.get_num_threads(), num_tasks))


@cache
def _compiled(dtype: torch.dtype) -> int:
    """The address of the dtype's code."""
    return simd.compiled(_COMPILED[dtype])


def _run(work: int, job: bytes, num_threads: int) -> None:
    """Lets ``num_threads`` threads do the job, this one among them. Releases the interpreter's lock."""
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
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        parallel = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if parallel is not None:
            parallel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
            parallel.restype = None
            return parallel  # type: ignore[no-any-return]
    return None
