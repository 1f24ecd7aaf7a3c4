"""Attention over a paged KV cache: all sequences of a step in one call, their KV read where it lies.

Owns the memory that :mod:`kernels.simd` needs.

Shapes as in :mod:`kernels.reference`.
"""

from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from kernels import simd, threads, vectors
from kernels.attention import LayerCache, TaskPlan

_LINE_BYTES = 64


def supports(cache: LayerCache) -> bool:
    """Whether :func:`attend` can read the cache: its heads are whole vectors."""
    return cache.keys.shape[-1] % vectors.LANES == 0 and cache.keys.dtype in (torch.float32, torch.bfloat16)


def attend(query: Tensor, cache: LayerCache, plan: TaskPlan, scale: float, output: Tensor) -> None:
    """Attention of each planned row of ``query`` [T, H, D] over its sequence, to the same row of ``output``.

    Sums are float32; where bfloat16 is multiplied in pairs, the softmax's weights are rounded to it. The first call
    for a dtype compiles it, or loads it from Numba's cache on disk.
    """
    keys, values, query = cache.keys, cache.values, query.contiguous()
    num_kv_heads, num_slots, head_dim = keys.shape
    group = query.shape[1] // num_kv_heads
    assert keys.is_contiguous() and values.is_contiguous() and output.is_contiguous()
    assert query.dtype == keys.dtype == values.dtype == output.dtype
    stored = _stored(query.dtype, head_dim)
    num_threads = min(torch.get_num_threads(), len(plan.tasks) * num_kv_heads)
    *buffers, room_bytes = _buffers(plan.max_queries * group, group, head_dim, stored)
    room = torch.empty(num_threads * room_bytes + _LINE_BYTES, dtype=torch.uint8)
    partials = torch.empty(plan.num_partials * num_kv_heads * group * (head_dim + 2))
    tickets = torch.zeros(2 + len(plan.first_part) * num_kv_heads, dtype=torch.int64)
    first_room = -(-room.data_ptr() // _LINE_BYTES) * _LINE_BYTES
    addresses = [x.data_ptr() for x in (query, keys, values, output, partials, tickets)]
    shapes = num_kv_heads, group, head_dim, num_slots
    job = simd.JOB.pack(*shapes, *addresses, first_room, room_bytes, *buffers, *plan.addresses, scale)
    threads.run(_compiled(stored), job, num_threads)


def _stored(dtype: torch.dtype, head_dim: int) -> object:
    """How numbers are multiplied: see :mod:`kernels.vectors`."""
    if dtype == torch.float32:
        return vectors.FLOAT32
    return vectors.PAIRED if vectors.HAS_PAIRS and head_dim % vectors.PANEL == 0 else vectors.WIDENED


@cache
def _buffers(num_rows: int, group: int, head_dim: int, stored: object) -> tuple[int, ...]:
    """Where each of simd.BUFFERS begins in a thread's room, in bytes, and the size of the room."""
    per_word = 2 if stored == vectors.PAIRED else 1
    words, width = head_dim // per_word, -(-head_dim // vectors.PANEL) * vectors.PANEL
    block = max(simd.BLOCK_ROWS, group)
    sizes = (
        *(2 * simd.TILE, num_rows * words, words * simd.TILE, simd.TILE // per_word * width),
        *(block * simd.TILE, block * width, 2 * block, num_rows * width, 2 * num_rows),
    )
    return tuple(accumulate((-(-4 * size // _LINE_BYTES) * _LINE_BYTES for size in sizes), initial=0))


@cache
def _compiled(stored: object) -> int:
    """The address of the code for what is stored."""
    return simd.compiled(stored)
