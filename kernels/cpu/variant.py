"""The CPU variant of every operation.

Attention reads the KV cache in place, for all sequences of a step in one call: see :mod:`kernels.cpu.attention.paged`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import AttentionPlan, LayerCache, PartPlan, PartSpan, SequenceSpan, SharedSpan
from kernels.cpu.attention import paged
from kernels.cpu.attention.shared import choose
from kernels.cpu.attention.tasks import plan_parts as plan_part_tasks
from kernels.cpu.attention.tasks import plan_tasks
from kernels.cpu.products.linear import pack
from kernels.cpu.rows.rows import add_rms_norm, gelu_mul, rms_norm, silu_mul
from kernels.reference import embedding, rotate, write_kv

__all__ = [
    "add_rms_norm",
    "attend_parts",
    "attention",
    "embedding",
    "gelu_mul",
    "pack",
    "plan",
    "plan_parts",
    "rms_norm",
    "rotate",
    "silu_mul",
    "write_kv",
]


def plan(
    spans: Sequence[SequenceSpan], *, window: int | None = None, shared: Sequence[SharedSpan] = ()
) -> AttentionPlan:
    """Implements :func:`kernels.reference.plan`, and cuts the attention into tasks.

    It keeps those of ``shared`` that save time. A decode's bits depend on its own tokens alone, and not on who shares
    them, where they lie, its batch, or the number of threads.
    """
    assert window is None or window > 0, window
    tasks = plan_tasks(spans, window, choose(spans, shared, window=window))
    return AttentionPlan(spans=tuple(spans), window=window, tasks=tasks)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float
) -> Tensor:
    """Implements :func:`kernels.reference.attention`, which it calls for heads that are not whole vectors."""
    assert plan.tasks is not None, plan
    if not paged.supports(cache):
        return reference.attention(query, keys, values, cache, plan, scale)
    output = torch.empty(query.shape, dtype=query.dtype)
    paged.attend(query, cache, plan.tasks, scale, output)
    return output


def plan_parts(spans: Sequence[PartSpan], shared: Sequence[SharedSpan] = ()) -> PartPlan:
    """Implements :func:`kernels.reference.plan_parts` in tasks, and keeps those of ``shared`` that save time."""
    return PartPlan(spans=tuple(spans), tasks=plan_part_tasks(spans, choose(spans, shared)))


def attend_parts(query: Tensor, cache: LayerCache, plan: PartPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Implements :func:`kernels.reference.attend_parts`, which it calls for heads that are not whole vectors."""
    if not paged.supports(cache):
        return reference.attend_parts(query, cache, plan, scale)
    output, stats = torch.zeros(query.shape, dtype=query.dtype), torch.zeros(*query.shape[:2], 2)
    if plan.tasks is not None:
        paged.attend(query, cache, plan.tasks, scale, output, stats)
    # The kernel's statistics are of powers of two; a row that sees nothing gets the logarithm of 0.
    return output, (stats[..., 0].clamp(min=-1e30) + stats[..., 1].log2()) * math.log(2)
