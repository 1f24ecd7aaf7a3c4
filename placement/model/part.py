"""Describes a part of a model: ranges of its layers, heads, columns and rows."""

from dataclasses import dataclass

from placement.model.layers import PagedState
from placement.model.specs import ModelSpec
from placement.model.striping import Stripe


@dataclass(frozen=True, slots=True)
class Span:
    """The half-open range ``[start, stop)`` of layers, heads, columns, rows or tokens."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.stop, self

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The part of a model that a rank holds. Each span but that of the layers may be empty.

    Attributes:
        layers: decoder layers.
        kv_heads: KV heads; the query heads that share them belong to the part too.
        ffn_columns: columns of the gate and up projections, which are inputs of the down projection.
        vocab_rows: rows of the embedding and of the output head; empty outside the stage of the first layer.
        stripe: the tokens whose KV the rank holds; None: all. A rank with a stripe has its layers and the embedding
            whole, and ``vocab_rows`` are those of the output head.
    """

    layers: Span
    kv_heads: Span
    ffn_columns: Span
    vocab_rows: Span
    stripe: Stripe | None = None

    @classmethod
    def whole(cls, model: ModelSpec) -> "Part":
        """Returns the part that is all of the model."""
        return cls(
            layers=Span(0, model.num_layers),
            kv_heads=Span(0, model.num_kv_heads),
            ffn_columns=Span(0, model.ffn_size),
            vocab_rows=Span(0, model.vocab_size),
        )


def kept_states(model: ModelSpec, layers: Span, kv_heads: Span) -> tuple[PagedState, ...]:
    """Lists the state that a rank with these layers and KV heads keeps of each token, first layer first."""
    return tuple(layer.attention.state(len(kv_heads)) for layer in model.layers[layers.start : layers.stop])
