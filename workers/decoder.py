"""The decoder of Llama (Touvron et al. 2023) and of the families after it, as ``ModelSpec`` tells them apart.

Knows nothing of ranks: the shapes of its weights say which heads and columns it computes.

    T  tokens of the batch, flattened over sequences      V  vocabulary
    E  hidden size                                        F  feed-forward size
    H  query heads, K  KV heads                           D  head dimension
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import AttentionPlan, LayerCache
from kernels.fused import FusedLayers, fuse
from kernels.linear import Linear, pack_rounded
from kernels.select import Kernels
from placement.specs import ModelSpec, RopeSpec
from placement.weights import EMBEDDING, FINAL_NORM, HEAD
from workers.weights import take_rounded

Window = int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer. Projections that read the same input are one matrix; norms are as ``rms_norm`` takes them."""

    window: Window
    attention_norm: Tensor  # [E]
    qkv: Linear  # E -> (H + 2K) * D
    qk_norm: Tensor | None  # [H + K, D]
    output: Linear  # H * D -> E
    attention_post_norm: Tensor | None  # [E]
    ffn_norm: Tensor  # [E]
    gate_up: Linear  # E -> 2F
    down: Linear  # F -> E
    ffn_post_norm: Tensor | None  # [E]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """A whole decoder."""

    embedding: Tensor  # [V, E]
    layers: tuple[Layer, ...]
    norm: Tensor  # [E]
    head: Linear  # E -> V
    frequencies: Mapping[Window, Tensor]  # [D / 2], of the layers with that window
    fused: FusedLayers | None  # all layers in one go, where there is code for it


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeTables:
    """Cosine and signed sine of every token's angles."""

    cos: Tensor  # [T, 1, D]
    sin: Tensor  # [T, 1, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What a step computes: tokens of several sequences, side by side.

    ``rope`` and ``attention`` have an entry for each window that some layer has.
    """

    token_ids: Tensor  # [T]
    slots: Tensor  # [T]: where each token's KV goes
    rope: Mapping[Window, RopeTables]
    attention: Mapping[Window, AttentionPlan]


def assemble(model: ModelSpec, tensors: dict[str, Tensor], kernels: Kernels) -> DecoderWeights:
    """Checkpoint tensors by Hugging Face name as a decoder. Takes them out of ``tensors``.

    Matrices are copied as they are fused and packed; the parts are let go layer by layer, so that at most one
    layer exists twice.
    """
    num_layers = sum(name.endswith(("self_attn.q_proj.weight", "self_attn.q_proj.codes")) for name in tensors)
    layers = tuple(_assemble_layer(model, tensors, layer, kernels) for layer in range(num_layers))
    embedding = tensors.pop(EMBEDDING)
    return DecoderWeights(
        embedding=embedding,
        layers=layers,
        norm=_norm(model, tensors, FINAL_NORM),
        head=_head(tensors, embedding, kernels),
        frequencies={
            window: frequencies(model.rope_of(window), model.head_dim).to(embedding.device)
            for window in model.distinct_windows
        },
        fused=fuse(
            layers,
            head_dim=model.head_dim,
            eps=model.rms_norm_eps,
            scale=_attention_scale(model),
            activation=model.activation,
        ),
    )


def _assemble_layer(model: ModelSpec, tensors: dict[str, Tensor], index: int, kernels: Kernels) -> Layer:
    prefix = f"model.layers.{index}"

    def linear(*names: str) -> Linear:
        biases = [tensors.pop(f"{prefix}.{name}.bias", None) for name in names]
        present = [bias for bias in biases if bias is not None]
        bias = torch.cat(present) if present else None
        rounded = take_rounded(tensors, [f"{prefix}.{name}" for name in names])
        if rounded is not None:
            return pack_rounded(rounded, bias, tensors[EMBEDDING].dtype)
        weights = [tensors.pop(f"{prefix}.{name}.weight") for name in names]
        return kernels.pack(weights[0] if len(weights) == 1 else torch.cat(weights), bias)

    def norm(name: str) -> Tensor:
        return _norm(model, tensors, f"{prefix}.{name}.weight")

    after_attention = norm("post_attention_layernorm")  # with post norms what it says, else before the feed-forward
    return Layer(
        window=model.window_of(index),
        attention_norm=norm("input_layernorm"),
        qk_norm=_qk_norm(model, tensors, f"{prefix}.self_attn") if model.qk_norm else None,
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=linear("self_attn.o_proj"),
        attention_post_norm=after_attention if model.post_norms else None,
        ffn_norm=norm("pre_feedforward_layernorm") if model.post_norms else after_attention,
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
        ffn_post_norm=norm("post_feedforward_layernorm") if model.post_norms else None,
    )


def _head(tensors: dict[str, Tensor], embedding: Tensor, kernels: Kernels) -> Linear:
    rounded = take_rounded(tensors, [HEAD.removesuffix(".weight")])
    if rounded is not None:
        return pack_rounded(rounded, None, embedding.dtype)
    return kernels.pack(tensors.pop(HEAD, embedding), None)


def _norm(model: ModelSpec, tensors: dict[str, Tensor], name: str) -> Tensor:
    """A norm's weight, as :func:`kernels.reference.rms_norm` takes it."""
    weight = tensors.pop(name)
    return 1.0 + weight.float() if model.unit_offset_norms else weight


def _qk_norm(model: ModelSpec, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """The norms of query and key [D], written out for each head: [H + K, D]."""
    form = "codes" if f"{prefix}.q_proj.codes" in tensors else "weight"
    num_heads, num_kv_heads = (len(tensors[f"{prefix}.{name}_proj.{form}"]) // model.head_dim for name in ("q", "k"))
    query = _norm(model, tensors, f"{prefix}.q_norm.weight").expand(num_heads, -1)
    key = _norm(model, tensors, f"{prefix}.k_norm.weight").expand(num_kv_heads, -1)
    return torch.cat((query, key))


def frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angle per position of each rotated pair, [D / 2] in float32."""
    plain = reference.rope_frequencies(head_dim, rope.theta)
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return reference.scale_llama3(
                plain,
                factor=rope.factor,
                low_freq_factor=rope.low_freq_factor,
                high_freq_factor=rope.high_freq_factor,
                original_max_tokens=rope.original_max_tokens,
            )
        case "yarn":
            return reference.scale_yarn(
                plain,
                theta=rope.theta,
                factor=rope.factor,
                beta_fast=rope.beta_fast,
                beta_slow=rope.beta_slow,
                original_max_tokens=rope.original_max_tokens,
                truncate=rope.truncate,
            )


def rope_tables(model: ModelSpec, weights: DecoderWeights, positions: Tensor) -> Mapping[Window, RopeTables]:
    """What rotates tokens at ``positions`` [T], for the layers of each window."""
    tables: dict[RopeSpec, RopeTables] = {}
    for window, turns in weights.frequencies.items():
        rope = model.rope_of(window)
        if rope not in tables:
            cos, sin = reference.rope_tables(positions, turns, weights.embedding.dtype, rope.attention_factor)
            tables[rope] = RopeTables(cos=cos, sin=sin)
    return {window: tables[model.rope_of(window)] for window in weights.frequencies}


def hidden_states(
    model: ModelSpec,
    weights: DecoderWeights,
    caches: Sequence[LayerCache],
    kernels: Kernels,
    batch: TokenBatch,
) -> Tensor:
    """The last layer's output [T, E], before the final norm. Writes the batch's KV to ``caches``."""
    eps = model.rms_norm_eps
    residual, update = _embed(model, weights, kernels, batch.token_ids), None
    if weights.fused is not None and weights.fused.takes(batch.attention):
        return weights.fused.run(residual, caches, batch.slots, batch.rope, batch.attention)
    for layer, cache in zip(weights.layers, caches, strict=True):
        if update is None:
            normed = kernels.rms_norm(residual, layer.attention_norm, eps)
        else:
            normed, residual = kernels.add_rms_norm(update, residual, layer.attention_norm, eps)
        update = _attend(model, layer, cache, kernels, batch, normed)
        normed, residual = kernels.add_rms_norm(update, residual, layer.ffn_norm, eps)
        update = _feed_forward(model, layer, kernels, normed)
    return residual if update is None else residual + update


def project(model: ModelSpec, weights: DecoderWeights, kernels: Kernels, x: Tensor) -> Tensor:
    """Logits [rows, V] of hidden states ``x`` [rows, E]."""
    return weights.head(kernels.rms_norm(x, weights.norm, model.rms_norm_eps))


def _embed(model: ModelSpec, weights: DecoderWeights, kernels: Kernels, token_ids: Tensor) -> Tensor:
    """[T] -> [T, E]."""
    x = kernels.embedding(token_ids, weights.embedding)
    if model.embedding_scale == 1.0:
        return x
    return x * torch.tensor(model.embedding_scale, dtype=x.dtype)  # a plain number would not be rounded


def _attend(
    model: ModelSpec, layer: Layer, cache: LayerCache, kernels: Kernels, batch: TokenBatch, x: Tensor
) -> Tensor:
    """[T, E] -> [T, E]."""
    num_kv_heads = cache.keys.shape[0]
    num_heads = num_kv_heads * model.queries_per_kv_head
    # [T, E] -> [T, H + 2K, D]
    qkv = layer.qkv(x).view(x.shape[0], -1, model.head_dim)
    turned, values = qkv[:, : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
    if layer.qk_norm is not None:
        turned = kernels.rms_norm(turned, layer.qk_norm, model.rms_norm_eps)
    rope = batch.rope[layer.window]
    turned = kernels.rotate(turned, rope.cos, rope.sin)
    query, keys = turned[:, :num_heads], turned[:, num_heads:]
    kernels.write_kv(cache, batch.slots, keys, values)
    plan = batch.attention[layer.window]
    attended = kernels.attention(query, keys, values, cache, plan, _attention_scale(model))  # [T, H, D]
    output = layer.output(attended.flatten(1))
    if layer.attention_post_norm is None:
        return output
    return kernels.rms_norm(output, layer.attention_post_norm, model.rms_norm_eps)


def _attention_scale(model: ModelSpec) -> float:
    return model.head_dim**-0.5 if model.attention_scale is None else model.attention_scale


def _feed_forward(model: ModelSpec, layer: Layer, kernels: Kernels, x: Tensor) -> Tensor:
    """[T, E] -> [T, 2F] -> [T, F] -> [T, E]."""
    activate = kernels.silu_mul if model.activation == "silu" else kernels.gelu_mul
    output = layer.down(activate(layer.gate_up(x)))
    if layer.ffn_post_norm is None:
        return output
    return kernels.rms_norm(output, layer.ffn_post_norm, model.rms_norm_eps)
