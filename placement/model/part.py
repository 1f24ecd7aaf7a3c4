"""A part of a model: ranges of its layers, heads, columns and rows."""

from dataclasses import dataclass

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
    """What a rank holds of a model. Each span may be empty, but for the layers.

    Attributes:
        layers: decoder layers.
        kv_heads: KV heads; the query heads that share them come along.
        ffn_columns: columns of the gate and up projections, rows of the down projection.
        vocab_rows: rows of the embedding and of the output head, in the stage of the first layer; else none.
        stripe: the tokens whose KV it holds; None: all. With a stripe a rank has the whole of its layers, and of the
            embedding, while ``vocab_rows`` are those of the output head.
    """

    layers: Span
    kv_heads: Span
    ffn_columns: Span
    vocab_rows: Span
    stripe: Stripe | None = None

    @classmethod
    def whole(cls, model: ModelSpec) -> "Part":
        """All of the model."""
        return cls(
            layers=Span(0, model.num_layers),
            kv_heads=Span(0, model.num_kv_heads),
            ffn_columns=Span(0, model.ffn_size),
            vocab_rows=Span(0, model.vocab_size),
        )
