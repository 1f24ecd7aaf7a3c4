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
from kernels.reference import rope_frequencies, scale_llama3
from kernels.select import Kernels
from placement.specs import ModelSpec, RopeSpec
from placement.weights import EMBEDDING, FINAL_NORM, HEAD


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer. Projections that read the same input are one matrix."""

    attention_norm: Tensor  # [E]
    qkv: Tensor  # [(H + 2K) * D, E]
    qkv_bias: Tensor | None
    output: Tensor  # [E, H * D]
    output_bias: Tensor | None
    ffn_norm: Tensor  # [E]
    gate_up: Tensor  # [2F, E]
    gate_up_bias: Tensor | None
    down: Tensor  # [E, F]
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """A whole decoder."""

    embedding: Tensor  # [V, E]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [E]
    head: Tensor  # [V, E]; the embedding itself where the two are tied


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What a step computes: tokens of several sequences, side by side."""

    token_ids: Tensor  # [T]
    slots: Tensor  # [T]: where each token's KV goes
    cos: Tensor  # [T, 1, D]
    sin: Tensor  # [T, 1, D]
    attention: AttentionPlan


def assemble(tensors: dict[str, Tensor]) -> DecoderWeights:
    """Checkpoint tensors by Hugging Face name as a decoder. Takes them out of ``tensors``.

    Fused matrices are copies; the parts are let go layer by layer, so that at most one layer exists twice.
    """
    num_layers = sum(name.endswith("self_attn.q_proj.weight") for name in tensors)
    layers = tuple(_assemble_layer(tensors, f"model.layers.{layer}") for layer in range(num_layers))
    embedding = tensors.pop(EMBEDDING)
    norm, head = tensors.pop(FINAL_NORM), tensors.pop(HEAD, embedding)
    return DecoderWeights(embedding=embedding, layers=layers, norm=norm, head=head)


def _assemble_layer(tensors: dict[str, Tensor], prefix: str) -> LayerWeights:
    def fused(*names: str) -> tuple[Tensor, Tensor | None]:
        weight = torch.cat([tensors.pop(f"{prefix}.{name}.weight") for name in names])
        biases = [tensors.pop(f"{prefix}.{name}.bias", None) for name in names]
        present = [bias for bias in biases if bias is not None]
        return weight, torch.cat(present) if present else None

    qkv, qkv_bias = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up, gate_up_bias = fused("mlp.gate_proj", "mlp.up_proj")
    return LayerWeights(
        attention_norm=tensors.pop(f"{prefix}.input_layernorm.weight"),
        qkv=qkv,
        qkv_bias=qkv_bias,
        output=tensors.pop(f"{prefix}.self_attn.o_proj.weight"),
        output_bias=tensors.pop(f"{prefix}.self_attn.o_proj.bias", None),
        ffn_norm=tensors.pop(f"{prefix}.post_attention_layernorm.weight"),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=tensors.pop(f"{prefix}.mlp.down_proj.weight"),
        down_bias=tensors.pop(f"{prefix}.mlp.down_proj.bias", None),
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
    return kernels.linear(kernels.rms_norm(x, weights.norm, model.rms_norm_eps), weights.head, None)


def _attend(
    model: ModelSpec, layer: LayerWeights, cache: LayerCache, kernels: Kernels, batch: TokenBatch, x: Tensor
) -> Tensor:
    """[T, E] -> [T, E]."""
    num_kv_heads = cache.keys.shape[0]
    num_heads = num_kv_heads * model.queries_per_kv_head
    # [T, E] -> [T, H + 2K, D]
    qkv = kernels.linear(x, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, model.head_dim)
    turned = kernels.rotate(qkv[:, : num_heads + num_kv_heads], batch.cos, batch.sin)
    query, keys = turned[:, :num_heads], turned[:, num_heads:]
    values = qkv[:, num_heads + num_kv_heads :]
    kernels.write_kv(cache, batch.slots, keys, values)
    scale = model.head_dim**-0.5
    attended = kernels.attention(query, keys, values, cache, batch.attention, scale)  # [T, H, D]
    return kernels.linear(attended.flatten(1), layer.output, layer.output_bias)


def _feed_forward(layer: LayerWeights, kernels: Kernels, x: Tensor) -> Tensor:
    """[T, E] -> [T, 2F] -> [T, F] -> [T, E]."""
    gate_up = kernels.linear(x, layer.gate_up, layer.gate_up_bias)
    return kernels.linear(kernels.silu_mul(gate_up), layer.down, layer.down_bias)
