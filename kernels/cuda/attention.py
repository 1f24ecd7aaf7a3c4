"""Attention over a paged KV cache, as planned by :mod:`kernels.cuda.plan`: the code on the host.

A decode's tokens are read once, in parts that run in parallel (Dao et al. 2023, FlashDecoding). A part that several
decodes share is read once for all of them (Juravsky et al. 2024, Hydragen). Chunks are tiled by queries (Dao 2023,
FlashAttention-2). The query heads of one KV head are rows of one tile, so keys and values are read once for all of
them.

Shapes: T tokens of a batch, H query heads, K KV heads, G = H / K, D head dimension, S slots.
"""

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from kernels.attention import AttentionPlan, LayerCache
from kernels.cuda.attention_kernels import chunk_kernel, decode_kernel, merge_kernel, shared_kernel
from kernels.cuda.gpus import num_multiprocessors
from kernels.cuda.plan import CHUNK, MEMBERS, DevicePlan

_LEAST_ROWS = 16  # the fewest rows of a tile that tensor cores multiply
_PROGRAMS = 16  # the programs for decodes on each multiprocessor, which share all parts
_SHARED_PROGRAMS = 4  # the programs for shared parts: as many as a multiprocessor holds at once
MERGED_AT_ONCE = 64  # how many partial results are merged at once
_LEAST_DIM = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The shape of a program: its query rows, its tokens at a time, its warps, and the tiles that it prefetches."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


def decode_tile(group: int, block_dim: int, itemsize: int) -> Tile:
    """Returns the tile for one query of ``group`` heads. It is bound by memory, so tiles are many and small."""
    tokens = max(16, min(64, 16384 // (block_dim * itemsize)))  # keys and values of 16 KB each
    return Tile(rows=max(_LEAST_ROWS, triton.next_power_of_2(group)), tokens=tokens, num_warps=4, num_stages=3)


def chunk_tile(block_dim: int, itemsize: int) -> Tile:
    """Returns the tile for many queries. It is bound by arithmetic, so it is as large as registers and memory allow."""
    if itemsize == 4:
        size = 32 if block_dim <= 128 else 16
        return Tile(rows=size, tokens=size, num_warps=4, num_stages=2)
    if block_dim <= 128:
        return Tile(rows=128, tokens=64, num_warps=4 if block_dim <= 64 else 8, num_stages=3)
    return Tile(rows=64, tokens=32, num_warps=8, num_stages=2)


def shared_tile(block_dim: int, itemsize: int) -> Tile:
    """Returns the tile for the queries of several decodes: a chunk's, but small enough not to waste rows on a few."""
    tile = chunk_tile(block_dim, itemsize)
    return replace(tile, rows=min(tile.rows, 64), num_warps=4 if block_dim <= 128 else 8)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float
) -> Tensor:
    """Implements :func:`kernels.reference.attention` for a plan of this variant. Rows of no sequence are not set.

    Sums are float32. The softmax's weights are rounded to the number type of the values before the multiplication.
    """
    assert isinstance(plan, DevicePlan), type(plan)
    _, num_slots, head_dim = cache.keys.shape
    assert query.stride(2) == 1 and cache.keys.is_contiguous() and cache.values.is_contiguous()
    assert query.dtype == cache.keys.dtype == cache.values.dtype
    assert num_slots * head_dim < 1 << 31, "offsets within a head are 32 bits"
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    with torch.cuda.device_of(query):
        if len(plan.decodes) or len(plan.shared):
            _decode(query, cache, plan, scale, output)
        if len(plan.chunks):
            _chunks(query, cache, plan, scale, output)
    return output


def _decode(query: Tensor, cache: LayerCache, plan: DevicePlan, scale: float, output: Tensor) -> None:
    """Computes the rows of decodes: their own parts, their shared parts, and the merge of the partial results."""
    num_kv_heads, num_slots, head_dim = cache.keys.shape
    num_heads = query.shape[1]
    group, block_dim = num_heads // num_kv_heads, block_dim_of(head_dim)
    partials = query.new_empty((plan.num_partials, num_heads, head_dim), dtype=torch.float32)
    masses = query.new_empty((plan.num_partials, num_heads), dtype=torch.float32)
    sizes = query.stride(0), query.stride(1), num_slots, num_kv_heads, scale * math.log2(math.e)
    if len(plan.decodes):
        tile = decode_tile(group, block_dim, query.itemsize)
        decode_kernel[_programs(plan.num_parts * num_kv_heads, _PROGRAMS, query.device)](
            *(query, cache.keys, cache.values, plan.slots, plan.counts, plan.decodes, output, partials, masses),
            *(*sizes, group, head_dim, block_dim, tile.rows, tile.tokens, widens(query)),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if len(plan.shared):
        tile = shared_tile(block_dim, query.itemsize)
        blocks = triton.cdiv(MEMBERS * group, tile.rows)
        shared_kernel[_programs(len(plan.shared) * num_kv_heads * blocks, _SHARED_PROGRAMS, query.device)](
            *(query, cache.keys, cache.values, plan.slots, plan.counts, plan.shared, plan.members, partials, masses),
            *(*sizes, group, head_dim, block_dim, tile.rows, tile.tokens, blocks, widens(query)),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if len(plan.merges):
        merge_kernel[(len(plan.merges), num_heads)](
            *(plan.counts, plan.merges, partials, masses, output),
            *(head_dim, block_dim, MERGED_AT_ONCE),
        )


def _programs(num_items: int, most: int, device: torch.device) -> tuple[int]:
    """Returns the grid for ``num_items`` items, with at most ``most`` programs for each multiprocessor."""
    return (min(num_items, most * num_multiprocessors(device)),)


def _chunks(query: Tensor, cache: LayerCache, plan: DevicePlan, scale: float, output: Tensor) -> None:
    """Computes the rows of chunks."""
    num_kv_heads, num_slots, head_dim = cache.keys.shape
    group, block_dim = query.shape[1] // num_kv_heads, block_dim_of(head_dim)
    tile = chunk_tile(block_dim, query.itemsize)
    blocks = triton.cdiv(CHUNK * group, tile.rows)
    chunk_kernel[(num_kv_heads * blocks, len(plan.chunks))](
        *(query, cache.keys, cache.values, plan.slots, plan.chunks, output),
        *(query.stride(0), query.stride(1), num_slots, num_kv_heads, scale * math.log2(math.e)),
        *(group, head_dim, block_dim, tile.rows, tile.tokens, plan.window or 0, widens(query)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def block_dim_of(head_dim: int) -> int:
    """Returns the columns of a tile: the head dimension, rounded up to a power of two."""
    return max(_LEAST_DIM, int(triton.next_power_of_2(head_dim)))


def widens(query: Tensor) -> bool:
    """Tells whether to widen the operands of products: Triton's interpreter would multiply the bits of bfloat16."""
    return query.device.type != "cuda" and query.dtype == torch.bfloat16
