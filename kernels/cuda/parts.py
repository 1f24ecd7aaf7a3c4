"""Attention of queries to a part of what they see: the code on the host.

Shapes: T rows of a batch, H query heads, K KV heads, D head dimension, S slots.
"""

import math

import torch
import triton
from torch import Tensor

from kernels.attention import LayerCache, PartPlan
from kernels.cuda.attention import MERGED_AT_ONCE, Tile, block_dim_of, chunk_tile, decode_tile, widens
from kernels.cuda.parts_kernels import join_kernel, part_kernel
from kernels.cuda.parts_plan import DevicePartPlan
from kernels.cuda.plan import CHUNK


def attend_parts(query: Tensor, cache: LayerCache, plan: PartPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Implements :func:`kernels.reference.attend_parts` for a plan of this variant."""
    assert isinstance(plan, DevicePartPlan), type(plan)
    num_kv_heads, num_slots, head_dim = cache.keys.shape
    num_heads = query.shape[1]
    assert query.stride(2) == 1 and cache.keys.is_contiguous() and cache.values.is_contiguous()
    assert query.dtype == cache.keys.dtype == cache.values.dtype
    assert num_slots * head_dim < 1 << 31, "offsets within a head are 32 bits"
    output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    logs = torch.full(query.shape[:2], -math.inf, device=query.device)
    partials = torch.empty((plan.num_partials, num_heads, head_dim), device=query.device)
    masses = torch.empty((plan.num_partials, num_heads), device=query.device)
    group, block_dim = num_heads // num_kv_heads, block_dim_of(head_dim)

    def run(tasks: Tensor, tile: Tile, max_queries: int) -> None:
        if not len(tasks):
            return
        blocks = triton.cdiv(max_queries * group, tile.rows)
        part_kernel[(len(tasks), num_kv_heads * blocks)](
            *(query, cache.keys, cache.values, plan.slots, plan.queries, tasks, output, logs, partials, masses),
            *(query.stride(0), query.stride(1), num_slots, num_kv_heads, scale * math.log2(math.e)),
            *(group, head_dim, block_dim, tile.rows, tile.tokens, widens(query)),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    with torch.cuda.device_of(query):
        run(plan.singles, decode_tile(group, block_dim, query.itemsize), 1)
        run(plan.chunks, chunk_tile(block_dim, query.itemsize), CHUNK)
        if len(plan.joins):
            join_kernel[(len(plan.joins), num_heads)](
                *(plan.joins, plan.queries, partials, masses, output, logs, head_dim, block_dim, MERGED_AT_ONCE)
            )
    return output, logs
