"""The Llama decoder (Touvron et al. 2023): embedding, layers of attention and feed-forward, norm, head.

Knows nothing of ranks: the shapes of its weights say which heads and columns it computes.

    T  tokens of the batch, flattened over sequences      V  vocabulary
    E  hidden size                                        F  feed-forward size
    H  query heads, K  KV heads                           D  head dimension
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import AttentionPlan, LayerCache
from kernels.linear import Linear
from kernels.reference import rope_frequencies, scale_llama3
from kernels.select import Kernels
from placement.specs import ModelSpec, RopeSpec
from placement.weights import EMBEDDING, FINAL_NORM, HEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer. Projections that read the same input are one matrix."""

    attention_norm: Tensor  # [E]
    qkv: Linear  # E -> (H + 2K) * D
    output: Linear  # H * D -> E
    ffn_norm: Tensor  # [E]
    gate_up: Linear  # E -> 2F
    down: Linear  # F -> E


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """A whole decoder."""

    embedding: Tensor  # [V, E]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [E]
    head: Linear  # E -> V


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What a step computes: tokens of several sequences, side by side."""

    token_ids: Tensor  # [T]
    slots: Tensor  # [T]: where each token's KV goes
    cos: Tensor  # [T, 1, D]
    sin: Tensor  # [T, 1, D]
    attention: AttentionPlan


def assemble(tensors: dict[str, Tensor], kernels: Kernels) -> DecoderWeights:
    """Checkpoint tensors by Hugging Face name as a decoder. Takes them out of ``tensors``.

    Matrices are copied as they are fused and packed; the parts are let go layer by layer, so that at most one
    layer exists twice.
    """
    num_layers = sum(name.endswith("self_attn.q_proj.weight") for name in tensors)
    layers = tuple(_assemble_layer(tensors, f"model.layers.{layer}", kernels) for layer in range(num_layers))
    embedding = tensors.pop(EMBEDDING)
    head = kernels.pack(tensors.pop(HEAD, embedding), None)
    return DecoderWeights(embedding=embedding, layers=layers, norm=tensors.pop(FINAL_NORM), head=head)


def _assemble_layer(tensors: dict[str, Tensor], prefix: str, kernels: Kernels) -> LayerWeights:
    def linear(*names: str) -> Linear:
        weights = [tensors.pop(f"{prefix}.{name}.weight") for name in names]
        biases = [tensors.pop(f"{prefix}.{name}.bias", None) for name in names]
        present = [bias for bias in biases if bias is not None]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return kernels.pack(weight, torch.cat(present) if present else None)

    return LayerWeights(
        attention_norm=tensors.pop(f"{prefix}.input_layernorm.weight"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=linear("self_attn.o_proj"),
        ffn_norm=tensors.pop(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )


def frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angle per position of each rotated pair, [D / 2] in float32."""
    plain = rope_frequencies(head_dim, rope.theta)
    if rope.kind == "default":
        return plain
    return scale_llama3(
        plain,
        factor=rope.factor,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        original_max_tokens=rope.original_max_tokens,
    )


def hidden_states(
    model: ModelSpec,
    weights: DecoderWeights,
    caches: Sequence[LayerCache],
    kernels: Kernels,
    batch: TokenBatch,
) -> Tensor:
    """The last layer's output [T, E], before the final norm. Writes the batch's KV to ``caches``."""
    x = kernels.embedding(batch.token_ids, weights.embedding)
    for layer, cache in zip(weights.layers, caches, strict=True):
        normed = kernels.rms_norm(x, layer.attention_norm, model.rms_norm_eps)
        x = x + _attend(model, layer, cache, kernels, batch, normed)
        normed = kernels.rms_norm(x, layer.ffn_norm, model.rms_norm_eps)
        x = x + _feed_forward(layer, kernels, normed)
    return x


def project(model: ModelSpec, weights: DecoderWeights, kernels: Kernels, x: Tensor) -> Tensor:
    """Logits [rows, V] of hidden states ``x`` [rows, E]."""
    return weights.head(kernels.rms_norm(x, weights.norm, model.rms_norm_eps))


def _attend(
    model: ModelSpec, layer: LayerWeights, cache: LayerCache, kernels: Kernels, batch: TokenBatch, x: Tensor
) -> Tensor:
    """[T, E] -> [T, E]."""
    num_kv_heads = cache.keys.shape[0]
    num_heads = num_kv_heads * model.queries_per_kv_head
    # [T, E] -> [T, H + 2K, D]
    qkv = layer.qkv(x).view(x.shape[0], -1, model.head_dim)
    turned = kernels.rotate(qkv[:, : num_heads + num_kv_heads], batch.cos, batch.sin)
    query, keys = turned[:, :num_heads], turned[:, num_heads:]
    values = qkv[:, num_heads + num_kv_heads :]
    kernels.write_kv(cache, batch.slots, keys, values)
    scale = model.head_dim**-0.5
    attended = kernels.attention(query, keys, values, cache, batch.attention, scale)  # [T, H, D]
    return layer.output(attended.flatten(1))


def _feed_forward(layer: LayerWeights, kernels: Kernels, x: Tensor) -> Tensor:
    """[T, E] -> [T, 2F] -> [T, F] -> [T, E]."""
    return layer.down(kernels.silu_mul(layer.gate_up(x)))
