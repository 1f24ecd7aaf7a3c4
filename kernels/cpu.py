"""CPU variants. Decodes read the KV cache where it lies, all of a step in one call: see :mod:`kernels.paged`.

A prefill's chunk runs torch's CPU flash attention, which also returns the log-sum-exp by which its context and
its own tokens are merged. The context is a view where it lies in one run of slots. A context in several runs is
gathered into one, once a chunk: against the chunk's arithmetic that is little, and the result has the same bits
wherever the blocks lie, so that tokens replayed after a fault are the same tokens even in bfloat16, where merging
run by run rounds each part.

Shapes: n queries of one sequence, R = G * n rows, L tokens, others as in :mod:`kernels.reference`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import paged
from kernels.attention import AttentionPlan, LayerCache, Run, SequenceSpan
from kernels.linear import pack
from kernels.reference import embedding, merge_partials, rms_norm, rotate, silu_mul, write_kv

__all__ = ["attention", "embedding", "pack", "plan", "rms_norm", "rotate", "silu_mul", "write_kv"]


def plan(spans: Sequence[SequenceSpan]) -> AttentionPlan:
    """As :func:`kernels.reference.plan`, with the decodes laid out for :mod:`kernels.paged`."""
    decodes = [span for span in spans if span.num_queries == 1]
    return AttentionPlan(spans=tuple(spans), decodes=paged.plan_decodes(decodes) if decodes else None)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float
) -> Tensor:
    """As :func:`kernels.reference.attention`.

    A single query sees all its tokens, so it reads the cache alone. A chunk reads its context from the cache
    and its own tokens, of which each query sees a different part, from ``keys`` and ``values``, which are
    dense even where the chunk's slots are not.
    """
    output = torch.empty(query.shape, dtype=query.dtype)
    chunks = plan.spans
    if plan.decodes is not None and paged.supports(cache):
        paged.decode(query, cache, plan.decodes, scale, output)
        chunks = tuple(span for span in chunks if span.num_queries > 1)
    for span in chunks:
        rows = slice(span.query_start, span.query_start + span.num_queries)
        # [n, H, D] -> [K, G, n, D]
        grouped = query[rows].view(span.num_queries, cache.keys.shape[0], -1, query.shape[-1]).permute(1, 2, 0, 3)
        attended = _attend_chunk(grouped, keys[rows], values[rows], cache, span, scale)
        output[rows].view(span.num_queries, *grouped.shape[:2], -1).copy_(attended.permute(2, 0, 1, 3))
    return output


def _attend_chunk(
    grouped: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, span: SequenceSpan, scale: float
) -> Tensor:
    """A sequence's queries [K, G, n, D] over its context and its own tokens: [K, G, n, D]."""
    attended, mass = _over_chunk(grouped, keys, values, scale)
    if span.context_runs:
        context, context_mass = _over_cache(grouped, cache, span.context_runs, scale)
        attended, _ = merge_partials((context, attended), (context_mass, mass))
    return attended


def _over_cache(grouped: Tensor, cache: LayerCache, runs: Sequence[Run], scale: float) -> tuple[Tensor, Tensor]:
    """Every query [K, G, n, D] over all slots of the runs: output [K, G, n, D] and log-sum-exp [K, G, n].

    The G query heads of a KV head are laid out as rows, so that its keys are read once for all of them.
    """
    shape = grouped.shape
    rows = grouped.flatten(1, 2)[None]  # [1, K, R, D]; a view where n = 1
    out, mass = _flash(rows, _dense(cache.keys, runs)[None], _dense(cache.values, runs)[None], scale)
    return out.view(shape), mass.reshape(shape[:3])


def _over_chunk(grouped: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query [K, G, n, D] over its chunk's tokens [n, K, D] up to its own: as :func:`_over_cache`.

    The KV head's keys are shared by its G query heads as a dim of stride 0.
    """
    shared_keys, shared_values = (x.transpose(0, 1)[:, None].expand(grouped.shape) for x in (keys, values))
    return _flash(grouped, shared_keys, shared_values, scale, is_causal=True)


def _dense(stored: Tensor, runs: Sequence[Run]) -> Tensor:
    """The runs' slots of ``stored`` [K, S, D] as [K, L, D]: a view of a single run, a copy of several."""
    if len(runs) == 1:
        ((start, stop),) = runs
        return stored[:, start:stop]
    return stored.index_select(1, torch.cat([torch.arange(start, stop) for start, stop in runs]))


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Flash attention [B, heads, rows, D] and its log-sum-exp [B, heads, rows] in float32.

    The public ``scaled_dot_product_attention`` runs the same operator but drops the log-sum-exp.
    """
    out, mass = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, is_causal, attn_mask=None, scale=scale
    )
    return out, mass
