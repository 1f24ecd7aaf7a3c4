"""The plain torch variant of every operation, which the fast variants must agree with and other devices run.

Shapes: T tokens of a batch, E hidden size, F feed-forward size, V vocabulary, H query heads, K KV heads,
G = H / K, D head dimension, S slots.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import AttentionPlan, LayerCache, PartPlan, PartSpan, SequenceSpan, SharedSpan, slots_of
from kernels.linear import Linear, PlainLinear


def embedding(token_ids: Tensor, table: Tensor) -> Tensor:
    """Returns the rows [T, E] of ``table`` [V, E] at ``token_ids`` [T]."""
    return F.embedding(token_ids, table)


def pack(weight: Tensor, bias: Tensor | None) -> Linear:
    """Makes a linear layer of ``weight`` [O, I] and ``bias`` [O], which the caller gives up."""
    return PlainLinear(weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes the root-mean-square norm (Zhang and Sennrich 2019) of each row of ``x`` in float32.

    Args:
        x: rows [T, E], or heads [T, N, D], each of which is normed; rows may be strided.
        weight: [E] or [N, D]. The normed row is rounded to the weight's number type before it is multiplied by the
            weight: to that of ``x`` as in Llama, or to float32 as in Gemma.
        eps: the constant that is added to the mean square.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (weight * (wide * scale).to(weight.dtype)).to(x.dtype)


def add_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the norm of ``residual + update``, and the sum itself, each [T, E].

    Variants may write both over the arguments.
    """
    total = residual + update
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """Computes SwiGLU (Shazeer 2020): ``silu(gate) * up`` [T, F] of ``gate_up`` [T, 2F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Computes GeGLU (Shazeer 2020), with GELU by tanh: ``gelu(gate) * up`` [T, F] of ``gate_up`` [T, 2F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Returns each pair's angle per position, [D / 2] in float32: ``theta ** (-2i / D)`` (Su et al. 2021)."""
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
    """Applies Llama 3.1's context extension: slows slow rotations by ``factor``, keeps fast ones, blends between."""
    wavelengths = 2 * math.pi / frequencies
    blend = (original_max_tokens / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / factor + blend * frequencies


def scale_yarn(
    frequencies: Tensor,
    *,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_tokens: int,
    truncate: bool,
) -> Tensor:
    """Applies YaRN's context extension (Peng et al. 2023): as :func:`scale_llama3`, but blends over indices.

    A frequency that turns ``beta_fast`` times in the original context is kept, and one that turns ``beta_slow`` times
    is slowed by ``factor``. ``truncate`` moves both ends of the blend outwards to whole indices.
    """
    num_pairs = frequencies.shape[0]

    def index_of(turns: float) -> float:
        return num_pairs * math.log(original_max_tokens / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index_of(beta_fast), index_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    high += 0.001 * (low == high)  # a step, where there is no range to blend over
    slowed = ((torch.arange(num_pairs, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    return slowed * frequencies / factor + (1 - slowed) * frequencies


def rope_tables(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Computes cosine and signed sine at ``positions`` [T], each [T, 1, D] and times ``scale``.

    Angles are float32; only the result is rounded to ``dtype``. The sine of the first half is negative, so
    that :func:`rotate` need not negate.
    """
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos[:, None].to(dtype), sin[:, None].to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs ``(i, i + D/2)`` of every head of ``x`` [T, heads, D] by the tables' angles."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((high, low), dim=-1) * sin


def write_kv(cache: LayerCache, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Stores ``keys`` and ``values`` [T, K, D] at ``slots`` [T] of the cache, in place."""
    cache.keys.index_copy_(1, slots, keys.transpose(0, 1))
    cache.values.index_copy_(1, slots, values.transpose(0, 1))


def plan(
    spans: Sequence[SequenceSpan], *, window: int | None = None, shared: Sequence[SharedSpan] = ()
) -> AttentionPlan:
    """Lays out which rows and slots of a step belong together, once for :func:`attention` in every layer.

    Args:
        spans: the step's sequences.
        window: how many positions a query sees: one at position p sees ``p - window + 1`` to p (Beltagy et al. 2020,
            Longformer; the convention of Mistral); None: all up to p. Layers of different windows need a plan each.
        shared: tokens that sequences have in common, which a variant may attend to once for all of them. The
            shared spans of one sequence are disjoint. They do not change the result, so the reference ignores them.
    """
    assert window is None or window > 0, window
    return AttentionPlan(spans=tuple(spans), window=window)


def attention(
    query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float
) -> Tensor:
    """Computes causal grouped-query attention (Ainslie et al. 2023) over a paged KV cache (Kwon et al. 2023).

    Args:
        query: the batch's queries [T, H, D].
        keys: the batch's own keys [T, K, D], which the cache already holds too; fast variants read them.
        values: the batch's own values, likewise.
        cache: keys and values [K, S, D] of all slots.
        plan: the step's sequences.
        scale: the factor of the scores, ``D ** -0.5``.

    Returns:
        The attention [T, H, D].
    """
    output = torch.empty_like(query)
    for span in plan.spans:
        rows = slice(span.query_start, span.query_start + span.num_queries)
        slots = torch.cat([torch.arange(*run, device=query.device) for run in span.runs])
        seen = cache.keys[:, slots], cache.values[:, slots]
        output[rows] = _dense_attention(query[rows], *seen, scale, plan.window)
    return output


def _dense_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Computes the attention of the last n tokens' ``query`` [n, H, D] to all ``keys`` and ``values`` [K, S, D]."""
    num_queries, num_tokens = query.shape[0], keys.shape[1]
    scores = _scores(query, keys, scale)
    position = torch.arange(num_tokens, device=query.device)
    own = position[num_tokens - num_queries :, None]
    hidden = position > own
    if window is not None:
        hidden |= position <= own - window
    weights = scores.masked_fill(hidden, -math.inf).softmax(dim=-1)
    return _weighted(weights, values).to(query.dtype)


def _scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Computes the scores [H, n, S] of ``query`` [n, H, D] and ``keys`` [K, S, D] in float32."""
    wide = keys.repeat_interleave(query.shape[1] // keys.shape[0], dim=0).float()
    return torch.einsum("nhd,hsd->hns", query.float(), wide) * scale


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Computes the averages [n, H, D] of ``values`` [K, S, D], weighted by ``weights`` [H, n, S], in float32."""
    wide = values.repeat_interleave(weights.shape[0] // values.shape[0], dim=0).float()
    return torch.einsum("hns,hsd->nhd", weights, wide)


def plan_parts(spans: Sequence[PartSpan], shared: Sequence[SharedSpan] = ()) -> PartPlan:
    """Lays out which rows and slots belong together, once for :func:`attend_parts` in every layer.

    ``shared`` has tokens that single queries have in common and see all of, with their places among the queries' own
    tokens. They do not change the result, so the reference ignores them.
    """
    return PartPlan(spans=tuple(spans))


def attend_parts(query: Tensor, cache: LayerCache, plan: PartPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Computes the attention of queries to a part of what they see, for :func:`merge_partials`.

    Args:
        query: the batch's queries [T, H, D].
        cache: keys and values [K, S, D] of all slots.
        plan: which rows see which slots.
        scale: the factor of the scores.

    Returns:
        The output [T, H, D], and the log of the sum of the scores' exponentials [T, H] in float32. Rows that see
        nothing or are in no span have 0 and minus infinity.
    """
    output = torch.zeros_like(query)
    mass = torch.full(query.shape[:2], -math.inf, device=query.device)
    for span in plan.spans:
        if not len(span.runs):
            continue
        rows = slice(span.query_start, span.query_start + span.num_queries)
        slots = torch.from_numpy(slots_of(span.runs)).to(query.device)
        position = torch.arange(len(slots), device=query.device)
        first, stop = torch.from_numpy(span.seen).to(query.device).unsqueeze(-1).unbind(1)
        scores = _scores(query[rows], cache.keys[:, slots], scale)
        scores = scores.masked_fill((position < first) | (position >= stop), -math.inf)  # [H, n, S]
        mass[rows] = scores.logsumexp(dim=-1).T
        weights = scores.softmax(dim=-1).nan_to_num(0.0)
        output[rows] = _weighted(weights, cache.values[:, slots]).to(query.dtype)
    return output, mass


def merge_partials(outputs: Sequence[Tensor], logsumexps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint sets of keys to attention over their union.

    Each part's output is its softmax average. Weighting it by its share of the exponential mass gives the average over
    all (Dao et al. 2023, FlashDecoding).

    Args:
        outputs: the parts' outputs, each [..., D].
        logsumexps: the log of the sum of exponentials of each part's scores, each [...] in float32.

    Returns:
        The output [..., D] and log-sum-exp [...] of the whole, in float32.
    """
    mass = torch.stack(list(logsumexps)).logsumexp(dim=0)
    output = torch.zeros(outputs[0].shape, dtype=torch.float32, device=mass.device)
    for part, part_mass in zip(outputs, logsumexps, strict=True):  # one at a time, so that one is held in float32
        output.addcmul_(part.float(), (part_mass - mass).exp()[..., None])
    return output, mass
