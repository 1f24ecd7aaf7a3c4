"""Counts what a decode of a model reads, computes and keeps."""

from dataclasses import dataclass

from placement.model.part import Part, kept_states
from placement.model.specs import DType, ModelSpec
from placement.model.weights import num_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWork:
    """The sizes of a model's decode.

    Attributes:
        weight_bytes: bytes of all weights.
        read_bytes: bytes of weights that a step reads: all but the rows of the embedding that no token has.
        flops_per_token: floating-point operations of the products for a token; a multiply and an add count as two.
        token_kv_bytes: bytes of a token's keys and values, by layer.
        windows: the most tokens that each layer attends to; None: all.
    """

    weight_bytes: int
    read_bytes: int
    flops_per_token: int
    token_kv_bytes: tuple[int, ...]
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: ModelSpec, dtype: DType) -> "DecodeWork":
        """Returns the sizes of a model whose weights, keys and values are numbers of that type."""
        parameters = num_parameters(model)
        computed = parameters if model.tied_embeddings else parameters - model.vocab_size * model.hidden_size
        part = Part.whole(model)
        states = kept_states(model, part.layers, part.kv_heads)
        return cls(
            weight_bytes=parameters * dtype.itemsize,
            read_bytes=computed * dtype.itemsize,
            flops_per_token=2 * computed,
            token_kv_bytes=tuple(state.elements_per_token * dtype.itemsize for state in states),
            windows=tuple(layer.attention.window for layer in model.layers),
        )

    @property
    def num_layers(self) -> int:
        """Counts the layers, each of which has an attention."""
        return len(self.token_kv_bytes)

    def kv_bytes(self, context: int) -> int:
        """Counts the bytes that a sequence of ``context`` tokens keeps."""
        return context * sum(self.token_kv_bytes)

    def attended_bytes(self, context: int) -> int:
        """Counts the bytes that a decode reads of a sequence of ``context`` tokens."""
        pairs = zip(self.token_kv_bytes, self.windows, strict=True)
        return sum(size * (context if window is None else min(context, window)) for size, window in pairs)
