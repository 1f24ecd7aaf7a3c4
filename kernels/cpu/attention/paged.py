"""Attention over a paged KV cache, for all sequences of a step in one call that reads their KV in place.

This module owns the memory that :mod:`kernels.cpu.attention.simd` needs.

Shapes as in :mod:`kernels.reference`.
"""

from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from kernels.attention import LayerCache, TaskPlan
from kernels.cpu.attention import simd
from kernels.cpu.attention.lanes import FLOAT32, HAS_PAIRS, LANES, PAIRED, PANEL, WIDENED
from kernels.cpu.attention.simd_tile import BLOCK_ROWS, TILE
from kernels.cpu.machine import threads
from kernels.cpu.machine.threads import Operation

_LINE_BYTES = 64


def supports(cache: LayerCache) -> bool:
    """Tells whether :func:`attend` can read the cache: its heads must be whole vectors."""
    return cache.keys.shape[-1] % LANES == 0 and cache.keys.dtype in (torch.float32, torch.bfloat16)


def attend(
    query: Tensor, cache: LayerCache, plan: TaskPlan, scale: float, output: Tensor, stats: Tensor | None = None
) -> None:
    """Computes the attention of each planned row of ``query`` [T, H, D], into the same row of ``output``.

    Sums are float32. Where bfloat16 is multiplied in pairs, the softmax's weights are rounded to it. The first call for
    a dtype compiles the code, or loads it from Numba's cache on disk.

    Args:
        stats: memory [T, H, 2] in float32 for the greatest score, times log2(e), and the sum of the exponentials
            relative to it; minus infinity and 0 where a row sees nothing. None: they are not wanted.
    """
    query, num_kv_heads = query.contiguous(), cache.keys.shape[0]
    assert output.is_contiguous() and query.dtype == output.dtype
    num_threads = min(torch.get_num_threads(), len(plan.tasks) * num_kv_heads)
    memory = Workspace(cache, query.shape[1], plan, num_threads)
    tickets = torch.zeros(num_tickets(plan, num_kv_heads), dtype=torch.int64)
    addresses = (query.data_ptr(), output.data_ptr(), tickets.data_ptr())
    stats_address = 0 if stats is None else stats.data_ptr()
    threads.run(*attention(cache, plan, scale, memory, *addresses, stats_address), num_threads)


def num_tickets(plan: TaskPlan, num_kv_heads: int) -> int:
    """Returns how many counters one operation needs, all 0 at first."""
    return 2 + len(plan.first_part) * num_kv_heads


class Workspace:
    """Memory for a plan's attention, which the layers use one after the other."""

    def __init__(self, cache: LayerCache, num_heads: int, plan: TaskPlan, num_threads: int) -> None:
        """Allocates memory for ``num_heads`` query heads and layers with caches of the shape of ``cache``."""
        num_kv_heads, _, head_dim = cache.keys.shape
        self.group = num_heads // num_kv_heads
        stored = _stored(cache.keys.dtype, head_dim)
        *self.buffers, self.scratch_bytes = _buffers(plan.max_queries * self.group, self.group, head_dim, stored)
        self._scratch = torch.empty(num_threads * self.scratch_bytes + _LINE_BYTES, dtype=torch.uint8)
        self._partials = torch.empty(plan.num_partials * num_heads * (head_dim + 2))
        self.scratch = -(-self._scratch.data_ptr() // _LINE_BYTES) * _LINE_BYTES
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
) -> Operation:
    """Makes the operation of :func:`attend`.

    ``query``, ``output``, ``tickets`` (:func:`num_tickets` zeros) and ``stats`` are addresses; ``stats`` may be 0.
    """
    keys, values = cache.keys, cache.values
    assert keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype
    num_kv_heads, num_slots, head_dim = keys.shape
    arguments = simd.ARGUMENTS.pack(
        *(num_kv_heads, memory.group, head_dim, num_slots),
        *(query, keys.data_ptr(), values.data_ptr(), output, stats, memory.partials, tickets),
        *(memory.scratch, memory.scratch_bytes, *memory.buffers, *plan.addresses),
        scale,
    )
    return _compiled(_stored(keys.dtype, head_dim)), arguments


def no_attention(cache: LayerCache) -> Operation:
    """Makes an operation whose arguments are zeros, to be replaced by those of :func:`attention`."""
    return _compiled(_stored(cache.keys.dtype, cache.keys.shape[-1])), bytes(simd.ARGUMENTS.size)


def _stored(dtype: torch.dtype, head_dim: int) -> object:
    """Returns the stored type, which tells how numbers are multiplied: see :mod:`kernels.cpu.attention.lanes`."""
    if dtype == torch.float32:
        return FLOAT32
    return PAIRED if HAS_PAIRS and head_dim % PANEL == 0 else WIDENED


@cache
def _buffers(num_rows: int, group: int, head_dim: int, stored: object) -> tuple[int, ...]:
    """Returns the byte at which each of simd.BUFFERS begins in a thread's scratch memory, and the size of that."""
    per_word = 2 if stored == PAIRED else 1
    words, width = head_dim // per_word, -(-head_dim // PANEL) * PANEL
    block = max(BLOCK_ROWS, group)
    sizes = (
        *(2 * TILE, num_rows * words, words * TILE, TILE // per_word * width),
        *(block * TILE, block * width, 2 * block, num_rows * width, 2 * num_rows),
    )
    return tuple(accumulate((-(-4 * size // _LINE_BYTES) * _LINE_BYTES for size in sizes), initial=0))


@cache
def _compiled(stored: object) -> int:
    """Returns the address of the code for a stored type."""
    return simd.compiled(stored)
