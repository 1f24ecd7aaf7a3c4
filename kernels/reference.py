"""Plain torch for every operation: what the fast variants must agree with, and what other devices run.

Shapes: T tokens of a batch, E hidden size, F feed-forward size, V vocabulary, H query heads, K KV heads,
G = H / K, D head dimension, S slots.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import AttentionPlan, LayerCache, SequenceSpan
from kernels.linear import Linear, PlainLinear


def embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows [T, E] of ``table`` [V, E] at ``token_ids`` [T]."""
    return F.embedding(token_ids, table)


def pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """A linear layer of ``weight`` [O, I] and ``bias`` [O], both let go by the caller."""
    return PlainLinear(weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019) of each row of ``x`` [T, E], computed in float32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020): ``silu(gate) * up`` [T, F] of ``gate_up`` [T, 2F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Angle per position [D / 2] of each rotated pair: ``theta ** (-2i / D)`` (Su et al. 2021), float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents)


def scale_llama3(
    frequencies: Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_tokens: int,
) -> Tensor:
    """Llama 3.1's context extension: slow rotations slowed by ``factor``, fast ones kept, blended between."""
    wavelengths = 2 * math.pi / frequencies
    blend = (original_max_tokens / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine, each [T, 1, D], at ``positions`` [T].

    Angles are float32; only the result is rounded to ``dtype``. The sine of the first half is negative, so
    that :func:`rotate` need not negate.
    """
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos[:, None].to(dtype), sin[:, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs ``(i, i + D/2)`` of every head of ``x`` [T, heads, D] by the tables' angles."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((high, low), dim=-1) * sin


def write_kv(cache: LayerCache, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Stores ``keys`` and ``values`` [T, K, D] at ``slots`` [T] of the cache, in place."""
    cache.keys.index_copy_(1, slots, keys.transpose(0, 1))
    cache.values.index_copy_(1, slots, values.transpose(0, 1))


def plan(spans: Sequence[SequenceSpan]) -> AttentionPlan:
    """Which rows and slots of a step belong together, laid out once for :func:`attention` in every layer."""
    return AttentionPlan(spans=tuple(spans))


def attention(
    query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float
) -> Tensor:
    """Causal grouped-query attention (Ainslie et al. 2023) over a paged KV cache (Kwon et al. 2023).

    Args:
        query: [T, H, D].
        keys: the batch's own keys [T, K, D], the same as the cache already holds; fast variants read them.
        values: likewise.
        cache: keys and values [K, S, D].
        plan: the step's sequences.
        scale: factor of the scores, ``D ** -0.5``.

    Returns:
        [T, H, D].
    """
    output = torch.empty_like(query)
    for span in plan.spans:
        rows = slice(span.query_start, span.query_start + span.num_queries)
        slots = torch.cat([torch.arange(*run, device=query.device) for run in span.runs])
        output[rows] = _dense_attention(query[rows], cache.keys[:, slots], cache.values[:, slots], scale)
    return output


def _dense_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The last n tokens' ``query`` [n, H, D] over all ``keys`` and ``values`` [K, S, D]: [n, H, D]."""
    num_queries, num_tokens = query.shape[0], keys.shape[1]
    group = query.shape[1] // keys.shape[0]
    keys, values = (x.repeat_interleave(group, dim=0).float() for x in (keys, values))
    scores = torch.einsum("nhd,hsd->hns", query.float(), keys) * scale
    position = torch.arange(num_tokens, device=query.device)
    hidden = position > position[num_tokens - num_queries :, None]
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return torch.einsum("hns,hsd->nhd", weights, values).to(query.dtype)


def merge_partials(outputs: Sequence[Tensor], logsumexps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint key sets, from attention over each.

    Each part's output is its softmax average; weighting it by the share of its exponential mass gives the
    average over all (Dao et al. 2023, FlashDecoding).

    Args:
        outputs: partial outputs, each [..., D].
        logsumexps: log of the sum of exponentials of each part's scores, each [...] in float32.

    Returns:
        The output [..., D] and log-sum-exp [...] of the whole, in float32.
    """
    masses = torch.stack(list(logsumexps))
    mass = masses.logsumexp(dim=0)
    shares = (masses - mass).exp()
    parts = torch.stack([part.float() for part in outputs])
    return (shares[..., None] * parts).sum(dim=0), mass
