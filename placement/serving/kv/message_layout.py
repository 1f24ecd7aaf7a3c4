"""Lays the keys and values that one rank sends another out in bytes, so that both agree on the place of each number.

Layers follow each other, so that each can be sent as soon as it is computed. Within a layer, KV heads follow each other
in spans of neighbours (one span, unless ranks hold copies of heads). Of each span of heads there are the keys [H, T, D]
and then the values [H, T, D]: by head, then by token, then by the dims of the head. T counts all tokens that the ranks
exchange of that layer and those heads, in ascending order, although they may be many runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from placement.model.part import Span
from placement.model.specs import DType
from placement.serving.kv.rectangles import RankTransfer, Rectangle


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """The keys or the values [H, T, D] of one layer, as bytes of a message.

    Attributes:
        layer: a layer of the model.
        is_value: whether it has values, and not keys.
        kv_heads: KV heads of the model.
        tokens: runs of positions in the sequence, in ascending order and apart.
        offset: the place of its first byte in the message.
        num_bytes: how many bytes it has.
    """

    layer: int
    is_value: bool
    kv_heads: Span
    tokens: tuple[Span, ...]
    offset: int
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Counts its tokens (T)."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True, kw_only=True)
class MessageLayout:
    """All that one rank sends another of a sequence, in the order of bytes.

    Attributes:
        tensors: without gaps between them; empty where the ranks have nothing for each other.
    """

    tensors: tuple[PackedTensor, ...]

    @cached_property
    def num_bytes(self) -> int:
        """Counts all bytes."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @cached_property
    def layers(self) -> dict[int, Span]:
        """Returns the bytes of each layer, in the order of layers."""
        spans: dict[int, Span] = {}
        for tensor in self.tensors:
            start = spans[tensor.layer].start if tensor.layer in spans else tensor.offset
            spans[tensor.layer] = Span(start, tensor.offset + tensor.num_bytes)
        return spans


def rectangle_bytes(rectangle: Rectangle, *, head_dim: int, dtype: DType) -> int:
    """Counts the bytes of a rectangle's keys and values, with ``head_dim`` numbers each."""
    return 2 * rectangle.size * head_dim * dtype.itemsize


def message_layout(
    transfers: Iterable[RankTransfer], *, source: int, target: int, head_dim: int, dtype: DType
) -> MessageLayout:
    """Lays out what rank ``source`` sends rank ``target``, as the module describes.

    Args:
        transfers: a transfer plan; those of other ranks are passed over.
        head_dim: the numbers of a key, and of a value (D).
        dtype: their number type, which is the same on both sides.
    """
    tokens: dict[tuple[Span, Span], list[Span]] = {}
    for transfer in transfers:
        if (transfer.source, transfer.target) == (source, target):
            key = transfer.rectangle.layers, transfer.rectangle.kv_heads
            tokens.setdefault(key, []).append(transfer.rectangle.tokens)
    parts: list[tuple[int, Span, tuple[Span, ...]]] = []
    for (layers, heads), spans in tokens.items():
        ordered = tuple(sorted(spans, key=lambda span: span.start))
        parts += [(layer, heads, ordered) for layer in range(layers.start, layers.stop)]
    tensors: list[PackedTensor] = []
    offset = 0
    for layer, heads, ordered in sorted(parts, key=lambda part: (part[0], part[1].start)):
        num_bytes = len(heads) * sum(map(len, ordered)) * head_dim * dtype.itemsize
        for is_value in (False, True):
            tensors.append(
                PackedTensor(
                    layer=layer, is_value=is_value, kv_heads=heads, tokens=ordered, offset=offset, num_bytes=num_bytes
                )
            )
            offset += num_bytes
    return MessageLayout(tensors=tuple(tensors))
