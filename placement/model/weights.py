"""Which part of which checkpoint tensor a rank holds. Owns the names and shapes of a checkpoint.

Cut as Megatron does (Shoeybi et al. 2019): query, key, value, gate and up projections by output rows,
output and down projections by input columns. Spans may be unequal between ranks.

Shapes: V vocabulary, E hidden size, F feed-forward size, H query heads, K KV heads, D head dimension.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from placement.model.part import Part, Span
from placement.model.specs import DType, ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """A rectangle of one checkpoint tensor.

    Attributes:
        name: the tensor's name in the checkpoint.
        shape: its full shape there.
        spans: what is read of it, one span a dim.
    """

    name: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.spans), self
        assert all(span.stop <= size for span, size in zip(self.spans, self.shape, strict=True)), self

    @property
    def num_elements(self) -> int:
        """Elements that are read."""
        return math.prod(len(span) for span in self.spans)


def shard_tensors(model: ModelSpec, part: Part) -> tuple[TensorSlice, ...]:
    """What a rank with this part reads, in the order of the forward pass.

    The stage with layer 0 holds the embedding, and the final norm and the head as well (which is the embedding where
    the two are tied): the last stage gives its output back to it, which is far less than logits, and the leader, which
    samples, is there. The bias of a projection whose partial results are summed over ranks is held once, by the rank
    with KV head 0 (or FFN column 0); norms, also those of queries and keys, are held whole by every rank of the stage.
    Slices of no elements are left out.
    """
    layers, is_first = part.layers, part.layers.start == 0
    table_shape = (model.vocab_size, model.hidden_size)
    slices: list[TensorSlice] = []
    if is_first:
        rows = part.vocab_rows if part.stripe is None else None
        slices.append(_slice(EMBEDDING, table_shape, rows=rows))
    for layer in range(layers.start, layers.stop):
        prefix = f"model.layers.{layer}"
        slices.append(_norm(model, f"{prefix}.input_layernorm"))
        slices.extend(_attention(model, f"{prefix}.self_attn", part.kv_heads))
        slices.append(_norm(model, f"{prefix}.post_attention_layernorm"))
        if model.post_norms:
            slices.append(_norm(model, f"{prefix}.pre_feedforward_layernorm"))
        slices.extend(_ffn(model, f"{prefix}.mlp", part.ffn_columns))
        if model.post_norms:
            slices.append(_norm(model, f"{prefix}.post_feedforward_layernorm"))
    if is_first:
        slices.append(_slice(FINAL_NORM, (model.hidden_size,)))
        if not model.tied_embeddings:
            slices.append(_slice(HEAD, table_shape, rows=part.vocab_rows))
    return tuple(slice_ for slice_ in slices if slice_.num_elements)


def whole_model(model: ModelSpec) -> tuple[TensorSlice, ...]:
    """Every tensor, whole: what the single rank of a one-rank replica reads."""
    return shard_tensors(model, Part.whole(model))


def weight_bytes(slices: Sequence[TensorSlice], dtype: DType) -> int:
    """Bytes of the slices once loaded as ``dtype``."""
    return dtype.itemsize * sum(slice_.num_elements for slice_ in slices)


def num_parameters(model: ModelSpec) -> int:
    """Parameters of the model; a tied head counts once."""
    return sum(slice_.num_elements for slice_ in whole_model(model))


def _attention(model: ModelSpec, prefix: str, kv_heads: Span) -> Iterator[TensorSlice]:
    """Query [H*D, E], key and value [K*D, E] by rows; norms of query and key [D]; output [E, H*D] by columns."""
    kv_width, hidden = model.head_dim, model.hidden_size
    query_width = model.queries_per_kv_head * kv_width
    for name, width in (("q_proj", query_width), ("k_proj", kv_width), ("v_proj", kv_width)):
        rows, num_rows = _scaled(kv_heads, width), model.num_kv_heads * width
        yield _slice(f"{prefix}.{name}.weight", (num_rows, hidden), rows=rows)
        if model.qkv_bias:
            yield _slice(f"{prefix}.{name}.bias", (num_rows,), rows=rows)
    if model.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield _slice(f"{prefix}.{name}.weight", (model.head_dim,))
    shape = (hidden, model.num_kv_heads * query_width)
    yield _slice(f"{prefix}.o_proj.weight", shape, columns=_scaled(kv_heads, query_width))
    if model.output_bias and _holds_zero(kv_heads):
        yield _slice(f"{prefix}.o_proj.bias", (hidden,))


def _ffn(model: ModelSpec, prefix: str, ffn_columns: Span) -> Iterator[TensorSlice]:
    """Gate and up [F, E] by rows; down [E, F] by columns."""
    hidden, ffn = model.hidden_size, model.ffn_size
    for name in ("gate_proj", "up_proj"):
        yield _slice(f"{prefix}.{name}.weight", (ffn, hidden), rows=ffn_columns)
        if model.mlp_bias:
            yield _slice(f"{prefix}.{name}.bias", (ffn,), rows=ffn_columns)
    yield _slice(f"{prefix}.down_proj.weight", (hidden, ffn), columns=ffn_columns)
    if model.mlp_bias and _holds_zero(ffn_columns):
        yield _slice(f"{prefix}.down_proj.bias", (hidden,))


def _norm(model: ModelSpec, name: str) -> TensorSlice:
    return _slice(f"{name}.weight", (model.hidden_size,))


def _slice(name: str, shape: tuple[int, ...], *, rows: Span | None = None, columns: Span | None = None) -> TensorSlice:
    """The whole of ``shape``, but for ``rows`` (dim 0) and ``columns`` (dim 1) where they are given."""
    cuts = (rows, columns)[: len(shape)]
    spans = tuple(Span(0, size) if cut is None else cut for cut, size in zip(cuts, shape, strict=True))
    return TensorSlice(name=name, shape=shape, spans=spans)


def _scaled(span: Span, width: int) -> Span:
    return Span(span.start * width, span.stop * width)


def _holds_zero(span: Span) -> bool:
    return span.start == 0 and len(span) > 0
