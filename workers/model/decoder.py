"""Computes the decoder of Llama (Touvron et al. 2023) and of later families, which ``ModelSpec`` tells apart.

It knows nothing of plans: the weights say which layers, heads, columns and vocabulary rows it computes, and a group
all-reduces what the ranks of its stage have computed.

    T  tokens of the batch, flattened over sequences      V  vocabulary
    E  hidden size                                        F  feed-forward size
    H  query heads, K  KV heads                           D  head dimension

H, K, F and V are those of the rank's part.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import Attend, AttentionPlan, LayerCache, PendingAttention, Window
from kernels.cpu.layers.fused import FusedLayers
from kernels.cpu.layers.partial import Partial, SumWork
from kernels.protocol import Kernels
from placement.model.specs import ModelSpec, RopeSpec
from workers.model.decoder_weights import DecoderWeights, Ends, Layer, attention_scale
from workers.model.group import Group
from workers.model.overlapped import Layers
from workers.model.progress import OnLayer
from workers.model.residual import Residual


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeTables:
    """The cosine and the signed sine of every token's angles."""

    cos: Tensor  # [T, 1, D]
    sin: Tensor  # [T, 1, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The tokens of a step: those of several sequences, side by side.

    Attributes:
        token_ids: the ids of the tokens.
        slots: the slot of the KV cache that each token's KV goes to.
        rope: the rotation of the tokens, for each window that some layer has.
        attention: the attention plan for each window; it is empty where there is ``attend``.
        attend: computes attention where other ranks hold some of the KV.
        on_layer: is told of each layer whose KV is written.
    """

    token_ids: Tensor  # [T]
    slots: Tensor  # [T]
    rope: Mapping[Window, RopeTables]
    attention: Mapping[Window, AttentionPlan]
    attend: Attend | None = None
    on_layer: OnLayer | None = None

    def wrote(self, num_layers: int) -> None:
        """Tells that the KV of the first ``num_layers`` layers is written, where somebody wants to know."""
        if self.on_layer is not None:
            self.on_layer(num_layers)


def rope_tables(model: ModelSpec, weights: DecoderWeights, positions: Tensor) -> Mapping[Window, RopeTables]:
    """Computes what rotates tokens at ``positions`` [T], for the layers of each window."""
    tables: dict[RopeSpec, RopeTables] = {}
    for window, frequencies in weights.frequencies.items():
        rope = model.rope_of(window)
        if rope not in tables:
            cos, sin = reference.rope_tables(positions, frequencies, weights.dtype, rope.attention_factor)
            tables[rope] = RopeTables(cos=cos, sin=sin)
    return {window: tables[model.rope_of(window)] for window in weights.frequencies}


def run_layers(
    model: ModelSpec,
    weights: DecoderWeights,
    caches: Sequence[LayerCache],
    kernels: Kernels,
    batch: TokenBatch,
    x: Tensor,
    *,
    sums: bool,
    sum_work: SumWork | None = None,
    first_row: int = 0,
    num_layers: int | None = None,
) -> Layers:
    """Runs the layers on the first one's input ``x`` [T, E], and writes the batch's KV to ``caches``.

    Args:
        sums: whether the weights are a rank's part, so that the outputs of attentions and feed-forwards are partial
            results. Each is yielded, and the layers go on once its all-reduce is in its place or finished; a ladder
            goes on once the all-reduce before it is.
        sum_work: all-reduces the partial results within the program, where the layers are a program.
        first_row: the batch's first row of the buffers, where others are computed in turn with it: see
            ``FusedLayers.run``.
        num_layers: the number of layers to compute, from the first on, for a measurement. Not for a ladder.

    Returns:
        The last layer's output [T, E], before the final norm.
    """
    if batch.attend is not None and not len(x):
        return _attend_for_others(model, weights, caches, batch.attend, x)
    if weights.fused is not None and weights.fused.takes(batch.attention):
        return (
            yield from _run_fused(
                weights.fused, caches, batch, x,
                sums=sums, sum_work=sum_work, first_row=first_row, num_layers=num_layers,
            )
        )  # fmt: skip
    assert sum_work is None or weights.fused is None, "other ranks would all-reduce otherwise"
    if model.ladder:
        return (yield from _run_ladder(model, weights, caches, kernels, batch, x, sums=sums))
    return (yield from _run_plain(model, weights.layers[:num_layers], caches, kernels, batch, x, sums=sums))


def _run_fused(
    fused: FusedLayers,
    caches: Sequence[LayerCache],
    batch: TokenBatch,
    x: Tensor,
    *,
    sums: bool,
    sum_work: SumWork | None,
    first_row: int,
    num_layers: int | None,
) -> Layers:
    """Runs the layers as a program, as :func:`run_layers` says."""
    layers = fused.run(
        x,
        caches,
        batch.slots,
        batch.rope,
        batch.attention,
        sums=sums,
        sum_work=sum_work,
        attend=batch.attend,
        first_row=first_row,
        num_layers=num_layers,
        on_layer=batch.on_layer,
    )
    return (yield from layers)


def _run_plain(
    model: ModelSpec,
    layers: Sequence[Layer],
    caches: Sequence[LayerCache],
    kernels: Kernels,
    batch: TokenBatch,
    x: Tensor,
    *,
    sums: bool,
) -> Layers:
    """Runs ``layers``, the first ones of those that have ``caches``, as :func:`run_layers` says."""
    if not layers:
        return x
    residual = Residual(rows=x, kernels=kernels, eps=model.rms_norm_eps)
    normed = kernels.rms_norm(x, layers[0].attention_norm, model.rms_norm_eps)
    following = [*(layer.attention_norm for layer in layers[1:]), None]
    for number, (layer, cache, next_norm) in enumerate(zip(layers, caches[: len(layers)], following, strict=True), 1):
        update = yield from _attend(model, layer, number - 1, cache, kernels, batch, normed)
        batch.wrote(number)
        normed = yield from residual.add(update, layer.attention_post_norm, layer.ffn_norm, sums=sums)
        update = _feed_forward(model, layer, kernels, normed)
        normed = yield from residual.add(update, layer.ffn_post_norm, next_norm, sums=sums)
    return normed


def _run_ladder(
    model: ModelSpec,
    weights: DecoderWeights,
    caches: Sequence[LayerCache],
    kernels: Kernels,
    batch: TokenBatch,
    x: Tensor,
    *,
    sums: bool,
) -> Layers:
    """Runs all layers, and adds each update to the residual one later (Zhang et al. 2025, Ladder-residual)."""
    residual = x
    updates: list[Tensor] = []  # the last two, not yet added

    def add_and_norm(residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if len(updates) < 2:
            return kernels.rms_norm(residual, weight, model.rms_norm_eps), residual
        return kernels.add_rms_norm(updates.pop(0), residual, weight, model.rms_norm_eps)

    for number, (layer, cache) in enumerate(zip(weights.layers, caches, strict=True), 1):
        normed, residual = add_and_norm(residual, layer.attention_norm)
        updates.append((yield from _attend(model, layer, number - 1, cache, kernels, batch, normed)))
        batch.wrote(number)
        if sums:
            yield Partial(update=updates[-1])
        normed, residual = add_and_norm(residual, layer.ffn_norm)
        updates.append(_feed_forward(model, layer, kernels, normed))
        if sums:
            yield Partial(update=updates[-1])
    if sums:
        yield Partial(update=x[:0])  # waits for the last all-reduce
    for update in updates:
        residual = residual + update
    return residual


def _attend_for_others(
    model: ModelSpec, weights: DecoderWeights, caches: Sequence[LayerCache], attend: Attend, x: Tensor
) -> Tensor:
    """Runs the layers of a rank that has no token of the step, but has KV that other ranks' tokens attend to."""
    query = x.new_empty(0, model.num_heads, model.head_dim)
    for number, (layer, cache) in enumerate(zip(weights.layers, caches, strict=True)):
        attend(number, layer.window, query, cache, attention_scale(model))
    return x


def project(model: ModelSpec, ends: Ends, kernels: Kernels, group: Group, x: Tensor) -> Tensor | None:
    """Computes the logits [rows, V] of hidden states ``x`` [rows, E] at the leader; None at other ranks."""
    normed = kernels.rms_norm(x, ends.norm, model.rms_norm_eps)
    logits = normed.new_empty(len(x), 0) if ends.head is None else ends.head(normed)
    return group.gather_columns(logits)


def embed(model: ModelSpec, ends: Ends, kernels: Kernels, group: Group, token_ids: Tensor) -> Tensor:
    """Looks up the first layer's input: [T] -> [T, E]."""
    if not group.sums:
        x = kernels.embedding(token_ids, ends.embedding)
    else:
        x = _embed_own(ends, kernels, token_ids)
        group.all_reduce(x)  # all ranks but one have zeros, so the sum is exact
    if model.embedding_scale == 1.0:
        return x
    return x * torch.tensor(model.embedding_scale, dtype=x.dtype)  # a plain number would not be rounded


def _embed_own(ends: Ends, kernels: Kernels, token_ids: Tensor) -> Tensor:
    """Looks up [T] -> [T, E], with zeros for the tokens whose rows other ranks hold."""
    if not len(ends.embedding):
        return ends.embedding.new_zeros(len(token_ids), ends.embedding.shape[1])
    local = token_ids - ends.first_row
    is_own = (local >= 0) & (local < len(ends.embedding))
    x = kernels.embedding(torch.where(is_own, local, 0), ends.embedding)
    return x.masked_fill_(~is_own[:, None], 0)


def _attend(
    model: ModelSpec, layer: Layer, number: int, cache: LayerCache, kernels: Kernels, batch: TokenBatch, x: Tensor
) -> Generator[PendingAttention, None, Tensor]:
    """Computes attention, [T, E] -> [T, E], as far as the rank's heads go; ``number`` counts the rank's layers."""
    if layer.qkv is None or layer.output is None:
        return torch.zeros_like(x)
    num_kv_heads = cache.keys.shape[0]
    num_heads = num_kv_heads * model.queries_per_kv_head
    # [T, E] -> [T, H + 2K, D]
    qkv = layer.qkv(x).view(x.shape[0], -1, model.head_dim)
    query_and_keys, values = qkv[:, : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
    if layer.qk_norm is not None:
        query_and_keys = kernels.rms_norm(query_and_keys, layer.qk_norm, model.rms_norm_eps)
    rope = batch.rope[layer.window]
    rotated = kernels.rotate(query_and_keys, rope.cos, rope.sin)
    query, keys = rotated[:, :num_heads], rotated[:, num_heads:]
    kernels.write_kv(cache, batch.slots, keys, values)
    scale = attention_scale(model)
    if batch.attend is not None:
        attended = batch.attend(number, layer.window, query, cache, scale)  # [T, H, D]
        if not isinstance(attended, Tensor):
            yield attended
            attended = attended.result()
    else:
        attended = kernels.attention(query, keys, values, cache, batch.attention[layer.window], scale)
    return layer.output(attended.flatten(1))


def _feed_forward(model: ModelSpec, layer: Layer, kernels: Kernels, x: Tensor) -> Tensor:
    """Computes the feed-forward, [T, E] -> [T, 2F] -> [T, F] -> [T, E], as far as the rank's columns go."""
    if layer.gate_up is None or layer.down is None:
        return torch.zeros_like(x)
    activate = kernels.silu_mul if model.activation == "silu" else kernels.gelu_mul
    return layer.down(activate(layer.gate_up(x)))
