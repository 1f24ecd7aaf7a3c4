"""Lays the keys and values that one rank sends another out in bytes, so that both agree on the place of each number.

Layers follow each other, so that each can be sent as soon as it is computed. Within a layer, KV heads follow each other
in spans of neighbours (one span, unless ranks hold copies of heads). Of each span of heads there are the keys [H, T, D]
and then the values [H, T, D]: by head, then by token, then by the dims of the head. T counts all tokens of the package
whose layer and heads these are, in ascending order, although they may be many runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from placement.model.part import Span
from placement.model.specs import DType
from placement.serving.kv.rectangles import Piece, Rectangle


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBlock:
    """The keys or the values of one layer, some KV heads and some tokens, as bytes of a package.

    Attributes:
        layer: a layer of the model.
        is_value: whether it has values, and not keys.
        kv_heads: KV heads of the model.
        tokens: runs of positions in the sequence, in ascending order and apart.
        offset: the place of its first byte in the package.
        num_bytes: the bytes of [KV heads, tokens, D] numbers.
    """

    layer: int
    is_value: bool
    kv_heads: Span
    tokens: tuple[Span, ...]
    offset: int
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Counts its tokens."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True, kw_only=True)
class Package:
    """All that one rank sends another of a sequence, in the order of bytes.

    Attributes:
        blocks: without gaps between them; empty where the ranks have nothing for each other.
    """

    blocks: tuple[PackedBlock, ...]

    @cached_property
    def num_bytes(self) -> int:
        """Counts all bytes."""
        return sum(block.num_bytes for block in self.blocks)

    @cached_property
    def layers(self) -> dict[int, Span]:
        """Returns the bytes of each layer, in the order of layers."""
        spans: dict[int, Span] = {}
        for block in self.blocks:
            start = spans[block.layer].start if block.layer in spans else block.offset
            spans[block.layer] = Span(start, block.offset + block.num_bytes)
        return spans


def rectangle_bytes(rectangle: Rectangle, *, head_dim: int, dtype: DType) -> int:
    """Counts the bytes of a rectangle's keys and values, with ``head_dim`` numbers each."""
    return 2 * rectangle.size * head_dim * dtype.itemsize


def pack(pieces: Iterable[Piece], *, source: int, target: int, head_dim: int, dtype: DType) -> Package:
    """Lays out what rank ``source`` sends rank ``target``, which the module describes.

    Args:
        pieces: a transfer plan; the pieces of other ranks are passed over.
        head_dim: the numbers of a key, and of a value (D).
        dtype: their number type, which is the same on both sides.
    """
    tokens: dict[tuple[Span, Span], list[Span]] = {}
    for piece in pieces:
        if (piece.source, piece.target) == (source, target):
            key = piece.rectangle.layers, piece.rectangle.kv_heads
            tokens.setdefault(key, []).append(piece.rectangle.tokens)
    parts: list[tuple[int, Span, tuple[Span, ...]]] = []
    for (layers, heads), spans in tokens.items():
        ordered = tuple(sorted(spans, key=lambda span: span.start))
        parts += [(layer, heads, ordered) for layer in range(layers.start, layers.stop)]
    blocks: list[PackedBlock] = []
    offset = 0
    for layer, heads, ordered in sorted(parts, key=lambda part: (part[0], part[1].start)):
        num_bytes = len(heads) * sum(map(len, ordered)) * head_dim * dtype.itemsize
        for is_value in (False, True):
            blocks.append(
                PackedBlock(
                    layer=layer, is_value=is_value, kv_heads=heads, tokens=ordered, offset=offset, num_bytes=num_bytes
                )
            )
            offset += num_bytes
    return Package(blocks=tuple(blocks))
