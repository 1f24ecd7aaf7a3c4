"""Puts the weights of a decoder, or of a rank's part of it, together from the tensors of a checkpoint.

    V  vocabulary        H  query heads, K  KV heads
    E  hidden size       D  head dimension
    F  feed-forward size

H, K, F and V are those of the rank's part.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import Window
from kernels.cpu.layers.fused import FusedLayers, fuse
from kernels.linear import Linear
from kernels.protocol import Kernels
from kernels.select import pack_rounded
from placement.model.layers import LayerSpec
from placement.model.part import Part
from placement.model.specs import ModelSpec, RopeSpec
from placement.model.weights import EMBEDDING, FINAL_NORM, HEAD
from workers.host.device import return_freed
from workers.model.rounded import take_rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The weights of one layer. Projections that read the same input are one matrix; ``rms_norm`` takes the norms.

    A rank without heads has no ``qkv`` and ``output``; one without columns has no ``gate_up`` and ``down``.
    """

    window: Window
    attention_norm: Tensor  # [E]
    qkv: Linear | None  # E -> (H + 2K) * D
    qk_norm: Tensor | None  # [H + K, D]
    output: Linear | None  # H * D -> E
    attention_post_norm: Tensor | None  # [E]
    ffn_norm: Tensor  # [E]
    gate_up: Linear | None  # E -> 2F
    down: Linear | None  # F -> E
    ffn_post_norm: Tensor | None  # [E]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The weights before the first layer and after the last, all of which the first stage has.

    Attributes:
        first_row: the row of the vocabulary that is the first of ``embedding``.
    """

    embedding: Tensor  # [V, E]
    norm: Tensor  # [E]
    head: Linear | None  # E -> V; None without rows
    first_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """The weights of a decoder, or of a rank's part of it."""

    dtype: torch.dtype
    ends: Ends | None
    layers: tuple[Layer, ...]
    frequencies: Mapping[Window, Tensor]  # [D / 2], of the layers with that window
    fused: FusedLayers | None  # all layers in one go, where there is code for it


def assemble(model: ModelSpec, part: Part, tensors: dict[str, Tensor], kernels: Kernels) -> DecoderWeights:
    """Makes a decoder of the checkpoint's tensors for ``part``, which it takes out of ``tensors``.

    Matrices are copied when they are fused and packed. The tensors are released layer by layer, so that at most one
    layer exists twice.
    """
    first_norm = tensors[f"model.layers.{part.layers.start}.input_layernorm.weight"]
    dtype, device = first_norm.dtype, first_norm.device
    layers = []
    for index, spec in list(enumerate(model.layers))[part.layers.start : part.layers.stop]:
        layers.append(_assemble_layer(model, spec, tensors, index, kernels, dtype))
        return_freed()  # else freed memory piles up: 7 MiB a layer of 88
    windows = dict.fromkeys(layer.window for layer in layers)
    return DecoderWeights(
        dtype=dtype,
        ends=_assemble_ends(model, part, tensors, kernels, dtype) if FINAL_NORM in tensors else None,
        layers=tuple(layers),
        frequencies={window: frequencies(model.rope_of(window), model.head_dim).to(device) for window in windows},
        fused=fuse(
            tuple(layers),
            head_dim=model.head_dim,
            eps=model.rms_norm_eps,
            scale=attention_scale(model),
            activation=model.activation,
            ladder=model.ladder,
        ),
    )


def _assemble_layer(
    model: ModelSpec, spec: LayerSpec, tensors: dict[str, Tensor], index: int, kernels: Kernels, dtype: torch.dtype
) -> Layer:
    prefix = f"model.layers.{index}"

    def linear(*names: str) -> Linear | None:
        biases = [tensors.pop(f"{prefix}.{name}.bias", None) for name in names]
        present = [bias for bias in biases if bias is not None]
        bias = torch.cat(present) if present else None
        rounded = take_rounded(tensors, [f"{prefix}.{name}" for name in names])
        if rounded is not None:
            return pack_rounded(rounded, bias, dtype)
        if f"{prefix}.{names[0]}.weight" not in tensors:
            return None
        weights = [tensors.pop(f"{prefix}.{name}.weight") for name in names]
        return kernels.pack(weights[0] if len(weights) == 1 else torch.cat(weights), bias)

    def norm(name: str) -> Tensor:
        return _norm(model, tensors, f"{prefix}.{name}.weight")

    # In a model with post norms this is attention's own; elsewhere it is the norm of the feed-forward's input.
    after_attention = norm("post_attention_layernorm")
    return Layer(
        window=spec.attention.window,
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


def _assemble_ends(
    model: ModelSpec, part: Part, tensors: dict[str, Tensor], kernels: Kernels, dtype: torch.dtype
) -> Ends:
    norm = _norm(model, tensors, FINAL_NORM)
    has_rows = len(part.vocab_rows) > 0
    embedding = tensors.pop(EMBEDDING, norm.new_empty(0, model.hidden_size, dtype=dtype))
    # Of ranks that share sequences each has all of the embedding, and a part of the head.
    tied = embedding if part.stripe is None else embedding[part.vocab_rows.start : part.vocab_rows.stop]
    return Ends(
        embedding=embedding,
        norm=norm,
        head=_head(tensors, tied, kernels) if has_rows else None,
        first_row=part.vocab_rows.start if part.stripe is None else 0,
    )


def _head(tensors: dict[str, Tensor], embedding: Tensor, kernels: Kernels) -> Linear:
    rounded = take_rounded(tensors, [HEAD.removesuffix(".weight")])
    if rounded is not None:
        return pack_rounded(rounded, None, embedding.dtype)
    return kernels.pack(tensors.pop(HEAD, embedding), None)


def _norm(model: ModelSpec, tensors: dict[str, Tensor], name: str) -> Tensor:
    """Takes a norm's weight, in the form that :func:`kernels.reference.rms_norm` takes."""
    weight = tensors.pop(name)
    return 1.0 + weight.float() if model.unit_offset_norms else weight


def _qk_norm(model: ModelSpec, tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """Takes the norms of query and key [D], and repeats them for each head: [H + K, D]."""
    form = "codes" if f"{prefix}.q_proj.codes" in tensors else "weight"
    names = (f"{prefix}.{name}_proj.{form}" for name in ("q", "k"))
    num_heads, num_kv_heads = (len(tensors[name]) // model.head_dim if name in tensors else 0 for name in names)
    query = _norm(model, tensors, f"{prefix}.q_norm.weight").expand(num_heads, -1)
    key = _norm(model, tensors, f"{prefix}.k_norm.weight").expand(num_kv_heads, -1)
    return torch.cat((query, key))


def frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Computes the angle per position of each rotated pair, [D / 2] in float32."""
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


def attention_scale(model: ModelSpec) -> float:
    """Returns the factor of the attention scores."""
    return model.head_dim**-0.5 if model.attention_scale is None else model.attention_scale
