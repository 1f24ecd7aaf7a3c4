"""Attention over a paged KV cache: all sequences of a step in one call, their KV read where it lies.

Owns the memory that :mod:`kernels.cpu.attention.simd` needs.

Shapes as in :mod:`kernels.reference`.
"""

from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from kernels.attention import LayerCache, TaskPlan
from kernels.cpu.attention import simd, vectors
from kernels.cpu.machine import threads

_LINE_BYTES = 64


def supports(cache: LayerCache) -> bool:
    """Whether :func:`attend` can read the cache: its heads are whole vectors."""
    return cache.keys.shape[-1] % vectors.LANES == 0 and cache.keys.dtype in (torch.float32, torch.bfloat16)


def attend(
    query: Tensor, cache: LayerCache, plan: TaskPlan, scale: float, output: Tensor, stats: Tensor | None = None
) -> None:
    """Attention of each planned row of ``query`` [T, H, D] over its sequence, to the same row of ``output``.

    Where ``stats`` [T, H, 2] are there, in float32, they get the greatest score, times log2(e), and the sum of the
    exponentials relative to it; no greatest score, and a sum of 0, where a row sees nothing.

    Sums are float32; where bfloat16 is multiplied in pairs, the softmax's weights are rounded to it. The first call
    for a dtype compiles it, or loads it from Numba's cache on disk.
    """
    query, num_kv_heads = query.contiguous(), cache.keys.shape[0]
    assert output.is_contiguous() and query.dtype == output.dtype
    num_threads = min(torch.get_num_threads(), len(plan.tasks) * num_kv_heads)
    memory = Workspace(cache, query.shape[1], plan, num_threads)
    tickets = torch.zeros(num_tickets(plan, num_kv_heads), dtype=torch.int64)
    addresses = (query.data_ptr(), output.data_ptr(), tickets.data_ptr())
    at_stats = 0 if stats is None else stats.data_ptr()
    threads.run(*attention(cache, plan, scale, memory, *addresses, at_stats), num_threads)


def num_tickets(plan: TaskPlan, num_kv_heads: int) -> int:
    """Counters that one call of the work needs, 0 at first."""
    return 2 + len(plan.first_part) * num_kv_heads


class Workspace:
    """Memory for a plan's attention, which one layer after the other can use."""

    def __init__(self, cache: LayerCache, num_heads: int, plan: TaskPlan, num_threads: int) -> None:
        """For ``num_heads`` query heads and all layers with a cache like ``cache``."""
        num_kv_heads, _, head_dim = cache.keys.shape
        self.group = num_heads // num_kv_heads
        stored = _stored(cache.keys.dtype, head_dim)
        *self.buffers, self.room_bytes = _buffers(plan.max_queries * self.group, self.group, head_dim, stored)
        self._room = torch.empty(num_threads * self.room_bytes + _LINE_BYTES, dtype=torch.uint8)
        self._partials = torch.empty(plan.num_partials * num_heads * (head_dim + 2))
        self.room = -(-self._room.data_ptr() // _LINE_BYTES) * _LINE_BYTES
        self.partials = self._partials.data_ptr()


def attention(
    cache: LayerCache,
    plan: TaskPlan,
    scale: float,
    memory: Workspace,
    query: int,
    output: int,
    tickets: int,
    stats: int = 0,
) -> tuple[int, bytes]:
    """The work of :func:`attend` and its job, from the addresses of query, output, ``num_tickets`` zeros and stats."""
    keys, values = cache.keys, cache.values
    assert keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype
    num_kv_heads, num_slots, head_dim = keys.shape
    job = simd.JOB.pack(
        *(num_kv_heads, memory.group, head_dim, num_slots),
        *(query, keys.data_ptr(), values.data_ptr(), output, stats, memory.partials, tickets),
        *(memory.room, memory.room_bytes, *memory.buffers, *plan.addresses),
        scale,
    )
    return _compiled(_stored(keys.dtype, head_dim)), job


def no_attention(cache: LayerCache) -> tuple[int, bytes]:
    """The work of :func:`attention`, and as many bytes as its job has."""
    return _compiled(_stored(cache.keys.dtype, cache.keys.shape[-1])), bytes(simd.JOB.size)


def _stored(dtype: torch.dtype, head_dim: int) -> object:
    """How numbers are multiplied: see :mod:`kernels.cpu.attention.vectors`."""
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
