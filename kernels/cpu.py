"""CPU variants. Attention reads the KV cache where it lies: a sequence in one run of slots is never copied.

The run is a strided view, given to torch's CPU flash attention, which also returns the log-sum-exp by which a
chunk's context and its own tokens are merged. A sequence in several runs is first gathered into one, for two
reasons. Its result then has the same bits wherever its blocks lie, so that tokens replayed after a fault are
the same tokens even in bfloat16, where merging run by run rounds each part. And it is faster for runs of up
to about 200 tokens: a call costs as much as copying a few hundred KB.

Shapes: n queries of one sequence, R = G * n rows, L tokens, others as in :mod:`kernels.reference`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import LayerCache, Run, SequenceSpan
from kernels.reference import embedding, linear, merge_partials, rms_norm, rotate, silu_mul, write_kv

__all__ = ["attention", "embedding", "linear", "rms_norm", "rotate", "silu_mul", "write_kv"]


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cache: LayerCache,
    spans: Sequence[SequenceSpan],
    scale: float,
) -> Tensor:
    """As :func:`kernels.reference.attention`.

    A single query sees all its tokens, so it reads the cache alone. A chunk reads its context from the cache
    and its own tokens, of which each query sees a different part, from ``keys`` and ``values``, which are
    dense even where the chunk's slots are not.
    """
    num_kv_heads, head_dim = cache.keys.shape[0], query.shape[-1]
    output = torch.empty(query.shape, dtype=query.dtype)
    for span in spans:
        rows = slice(span.query_start, span.query_start + span.num_queries)
        grouped = query[rows].view(span.num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [K, G, n, D]
        if span.num_queries == 1:
            attended, _ = _over_cache(grouped, cache, span.runs, scale)
        else:
            attended, mass = _over_chunk(grouped, keys[rows], values[rows], scale)
            if span.context_runs:
                context, context_mass = _over_cache(grouped, cache, span.context_runs, scale)
                attended, _ = merge_partials((context, attended), (context_mass, mass))
        output[rows].view(span.num_queries, num_kv_heads, -1, head_dim).copy_(attended.permute(2, 0, 1, 3))
    return output


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
