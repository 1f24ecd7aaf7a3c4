"""CPU variants. Attention reads the KV cache where it lies: no key or value is gathered or copied.

Each run of slots is a strided view, given to torch's CPU flash attention, which also returns the
log-sum-exp; partial outputs are merged by it.

Shapes: n queries of one sequence, R = G * n rows, others as in :mod:`kernels.reference`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import LayerCache, SequenceSpan
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
    output = torch.empty(query.shape, dtype=query.dtype)
    for span in spans:
        rows = slice(span.query_start, span.query_start + span.num_queries)
        grouped = query[rows].view(span.num_queries, cache.keys.shape[0], -1, query.shape[-1])  # [n, K, G, D]
        if span.num_queries == 1:
            parts = _over_cache(grouped, cache, span.runs, scale)
        else:
            parts = _over_cache(grouped, cache, span.context_runs, scale)
            parts.append(_over_chunk(grouped, keys[rows], values[rows], scale))
        # [K, G, n, D] -> [n, K, G, D]
        output[rows].view_as(grouped).copy_(_merge(parts).view(*_group_shape(grouped)).permute(2, 0, 1, 3))
    return output


def _over_cache(
    grouped: Tensor, cache: LayerCache, runs: Sequence[tuple[int, int]], scale: float
) -> list[tuple[Tensor, Tensor]]:
    """Every query over all slots of each run: outputs [K, R, D] and log-sum-exps [K, R].

    The G query heads of a KV head are laid out as rows, so that its keys are read once for all of them.
    """
    rows = grouped.permute(1, 2, 0, 3).flatten(1, 2)[None]  # [1, K, R, D]; a view where n = 1
    parts = []
    for start, stop in runs:
        out, mass = _flash(rows, cache.keys[None, :, start:stop], cache.values[None, :, start:stop], scale)
        parts.append((out[0], mass[0]))
    return parts


def _over_chunk(grouped: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query over its chunk's tokens up to its own: output [K, R, D] and log-sum-exp [K, R]."""
    shape = _group_shape(grouped)
    query = grouped.permute(1, 2, 0, 3)  # [K, G, n, D]
    shared_keys, shared_values = (x.transpose(0, 1)[:, None].expand(shape) for x in (keys, values))
    out, mass = _flash(query, shared_keys, shared_values, scale, is_causal=True)
    return out.flatten(1, 2), mass.flatten(1, 2)


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


def _merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    if len(parts) == 1:
        return parts[0][0]
    outputs, masses = zip(*parts, strict=True)
    return merge_partials(outputs, masses)[0]


def _group_shape(grouped: Tensor) -> tuple[int, int, int, int]:
    """(K, G, n, D) of ``grouped`` [n, K, G, D]."""
    n, num_kv_heads, group, head_dim = grouped.shape
    return num_kv_heads, group, n, head_dim
