"""Decides which part of which checkpoint tensor a rank holds. Owns the names and shapes of a checkpoint's tensors.

Tensors are cut as Megatron does (Shoeybi et al. 2019): query, key, value, gate and up projections by output rows,
output and down projections by input columns. Spans may be unequal between ranks.

Shapes: V vocabulary, E hidden size, F feed-forward size, H query heads, K KV heads, D head dimension.
"""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass

from placement.model.layers import Dense, Gqa
from placement.model.part import Part, Span
from placement.model.specs import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """A rectangle of one checkpoint tensor.

    Attributes:
        name: the tensor's name in the checkpoint.
        shape: its full shape there.
        spans: the rows, columns and so on that are read, one span for each dim.
    """

    name: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.spans), self
        assert all(span.stop <= size for span, size in zip(self.spans, self.shape, strict=True)), self

    @property
    def num_elements(self) -> int:
        """Counts the elements that are read."""
        return math.prod(len(span) for span in self.spans)


def shard_tensors(model: ModelSpec, part: Part) -> tuple[TensorSlice, ...]:
    """Lists what a rank with this part reads, in the order of the forward pass.

    The stage with layer 0 holds the embedding, and also the final norm and the head (which is the embedding where the
    two are tied), because the leader, which samples, belongs to it. The last stage sends its output back to it, which
    takes far fewer bytes than logits. Where the results of a projection are all-reduced, one rank holds its bias: the
    one with KV head 0 (or FFN column 0). Every rank of the stage holds all norms whole, those of queries and keys too.
    Slices of no elements are left out.
    """
    layers, is_first = part.layers, part.layers.start == 0
    table_shape = (model.vocab_size, model.hidden_size)
    slices: list[TensorSlice] = []
    if is_first:
        rows = part.vocab_rows if part.stripe is None else None
        slices.append(_slice(EMBEDDING, table_shape, rows=rows))
    for index, layer in enumerate(model.layers[layers.start : layers.stop], start=layers.start):
        prefix = f"model.layers.{index}"
        slices.append(_norm(model, f"{prefix}.input_layernorm"))
        slices.extend(_attention(model, layer.attention, f"{prefix}.self_attn", part.kv_heads))
        slices.append(_norm(model, f"{prefix}.post_attention_layernorm"))
        if model.post_norms:
            slices.append(_norm(model, f"{prefix}.pre_feedforward_layernorm"))
        slices.extend(_ffn(model, layer.ffn, f"{prefix}.mlp", part.ffn_columns))
        if model.post_norms:
            slices.append(_norm(model, f"{prefix}.post_feedforward_layernorm"))
    if is_first:
        slices.append(_slice(FINAL_NORM, (model.hidden_size,)))
        if not model.tied_embeddings:
            slices.append(_slice(HEAD, table_shape, rows=part.vocab_rows))
    return tuple(slice_ for slice_ in slices if slice_.num_elements)


def stored_name(name: str, stored: Container[str]) -> str:
    """Returns the name of a tensor in a checkpoint that has the tensors ``stored``.

    Of a tied pair a checkpoint may have saved either: transformers takes the head's for the embedding's.
    """
    return HEAD if name == EMBEDDING and EMBEDDING not in stored and HEAD in stored else name


def whole_model(model: ModelSpec) -> tuple[TensorSlice, ...]:
    """Lists every tensor whole: the slices that the only rank of a one-rank replica reads."""
    return shard_tensors(model, Part.whole(model))


def num_parameters(model: ModelSpec) -> int:
    """Counts the parameters of the model; a tied head counts once."""
    return sum(slice_.num_elements for slice_ in whole_model(model))


def _attention(model: ModelSpec, attention: Gqa, prefix: str, kv_heads: Span) -> Iterator[TensorSlice]:
    """Yields query [H*D, E], key and value [K*D, E] by rows, norms of query and key [D], output [E, H*D] by columns."""
    kv_width, hidden = attention.head_dim, model.hidden_size
    query_width = attention.num_heads // attention.num_kv_heads * kv_width
    for name, width in (("q_proj", query_width), ("k_proj", kv_width), ("v_proj", kv_width)):
        rows, num_rows = _scaled(kv_heads, width), attention.num_kv_heads * width
        yield _slice(f"{prefix}.{name}.weight", (num_rows, hidden), rows=rows)
        if model.qkv_bias:
            yield _slice(f"{prefix}.{name}.bias", (num_rows,), rows=rows)
    if model.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield _slice(f"{prefix}.{name}.weight", (attention.head_dim,))
    shape = (hidden, attention.num_kv_heads * query_width)
    yield _slice(f"{prefix}.o_proj.weight", shape, columns=_scaled(kv_heads, query_width))
    if model.output_bias and _holds_zero(kv_heads):
        yield _slice(f"{prefix}.o_proj.bias", (hidden,))


def _ffn(model: ModelSpec, ffn: Dense, prefix: str, ffn_columns: Span) -> Iterator[TensorSlice]:
    """Yields gate and up [F, E] by rows, down [E, F] by columns."""
    hidden = model.hidden_size
    for name in ("gate_proj", "up_proj"):
        yield _slice(f"{prefix}.{name}.weight", (ffn.size, hidden), rows=ffn_columns)
        if model.mlp_bias:
            yield _slice(f"{prefix}.{name}.bias", (ffn.size,), rows=ffn_columns)
    yield _slice(f"{prefix}.down_proj.weight", (hidden, ffn.size), columns=ffn_columns)
    if model.mlp_bias and _holds_zero(ffn_columns):
        yield _slice(f"{prefix}.down_proj.bias", (hidden,))


def _norm(model: ModelSpec, name: str) -> TensorSlice:
    return _slice(f"{name}.weight", (model.hidden_size,))


def _slice(name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None) -> TensorSlice:
    """Makes a slice of all of ``shape``, or of ``rows`` (dim 0) and ``columns`` (dim 1) where they are given."""
    cuts = (rows, columns)[: len(shape)]
    spans = tuple(Span(0, size) if cut is None else cut for cut, size in zip(cuts, shape, strict=True))
    return TensorSlice(name=name, shape=shape, spans=spans)


def _scaled(span: Span, width: int) -> Span:
    return Span(span.start * width, span.stop * width)


def _holds_zero(span: Span) -> bool:
    return span.start == 0 and len(span) > 0
