"""Attention over a paged KV cache, its work laid out by :mod:`kernels.cuda.plan`: the host's part.

Decodes read their tokens once, in parts that run side by side (Dao et al. 2023, FlashDecoding); a part that several of
them share is read once for all (Juravsky et al. 2024, Hydragen). Chunks tile their queries (Dao 2023,
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

_LEAST_ROWS = 16  # of a tile that tensor cores multiply
_PROGRAMS = 16  # of decodes, for each multiprocessor; each takes every so many-th part
_SHARED_PROGRAMS = 4  # of what decodes share: as many as a multiprocessor holds at once
MERGED_AT_ONCE = 64  # partial results
_LEAST_DIM = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How a program is cut: query rows and tokens that meet at once, its warps, and tiles on their way from memory."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


def decode_tile(group: int, block_dim: int, itemsize: int) -> Tile:
    """For one query of ``group`` heads: bound by memory, so tiles are many and small."""
    tokens = max(16, min(64, 16384 // (block_dim * itemsize)))  # 16 KB each of keys and of values
    return Tile(rows=max(_LEAST_ROWS, triton.next_power_of_2(group)), tokens=tokens, num_warps=4, num_stages=3)


def chunk_tile(block_dim: int, itemsize: int) -> Tile:
    """For many queries: bound by arithmetic, so that tiles are as large as registers and shared memory hold."""
    if itemsize == 4:
        size = 32 if block_dim <= 128 else 16
        return Tile(rows=size, tokens=size, num_warps=4, num_stages=2)
    if block_dim <= 128:
        return Tile(rows=128, tokens=64, num_warps=4 if block_dim <= 64 else 8, num_stages=3)
    return Tile(rows=64, tokens=32, num_warps=8, num_stages=2)


def shared_tile(block_dim: int, itemsize: int) -> Tile:
    """For the queries of several decodes: as a chunk's, but small enough that two decodes do not wait for its rows."""
    tile = chunk_tile(block_dim, itemsize)
    return replace(tile, rows=min(tile.rows, 64), num_warps=4 if block_dim <= 128 else 8)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float
) -> Tensor:
    """As :func:`kernels.reference.attention`, with a plan of this variant. Rows that no sequence owns are not set.

    Sums are float32; softmax's weights are rounded to the number type of the values before they multiply them.
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
    """The grid for so many items, with no more than ``most`` programs for each multiprocessor."""
    return (min(num_items, most * num_multiprocessors(device)),)


def _chunks(query: Tensor, cache: LayerCache, plan: DevicePlan, scale: float, output: Tensor) -> None:
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
    """Columns of a tile: a power of two."""
    return max(_LEAST_DIM, int(triton.next_power_of_2(head_dim)))


def widens(query: Tensor) -> bool:
    """Whether operands of products are widened first: Triton's interpreter multiplies the bits of bfloat16."""
    return query.device.type != "cuda" and query.dtype == torch.bfloat16
