"""Knows which bytes of an awaited transfer are due, so that each comes exactly once. Pure.

A source rank sends, of each layer that both ranks have, every portion of the transfer in order, and each portion from
its first byte to its last. Where it has nothing of a portion for this rank it sends one empty piece, so that this rank
knows. Source ranks deal portions out among them, so all must cut the transfer at the same tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from placement.errors import HeterodyneError, InvalidRequest
from placement.model.part import Span
from placement.serving.kv.message_layout import MessageLayout
from placement.serving.kv.portions import PORTION_TOKENS, PortionLayouts
from placement.serving.kv.rectangles import common_layers
from workers.kv_transfer.wire import Piece


class NotDue(HeterodyneError):
    """A piece is not the one that must come next, so the transfer has failed."""


@dataclass(slots=True)
class _Track:
    """Notes what has come of one layer from one source rank.

    Attributes:
        first_token: the first token of the portion that is due.
        num_filled: the bytes of it that have come.
        memory: memory for all of its bytes, once it has begun.
    """

    first_token: int
    num_filled: int = 0
    memory: bytearray | None = None


@dataclass(frozen=True, slots=True)
class LayerPortion:
    """A layer of a portion that has come whole from one source rank.

    Attributes:
        layer: a layer of the model.
        portion: the tokens.
        layout: all that the source rank sends this one of the portion.
        memory: the bytes of the layer.
    """

    layer: int
    portion: Span
    layout: MessageLayout
    memory: bytearray


class Arrivals:
    """Notes what has come of one transfer at one target rank.

    Attributes:
        num_bytes: the bytes that have come.
    """

    def __init__(self, layouts: PortionLayouts, *, rank: int, tokens: Span) -> None:
        """Raises InvalidRequest where the source replica does not hold all that this rank needs."""
        self._layouts = layouts
        self._rank = rank
        self._tokens = tokens
        self._stops: dict[int, int] = {}  # where each portion ends, by its first token
        self._tracks: dict[tuple[int, int], _Track] = {}
        self.num_bytes = 0
        layouts.check(tokens)
        for source, part in enumerate(layouts.source.parts):
            layers = common_layers(part, layouts.target.parts[rank], tokens)
            for layer in range(layers.start, layers.stop):
                self._tracks[source, layer] = _Track(tokens.start)

    @property
    def is_complete(self) -> bool:
        """Tells whether all has come."""
        return not self._awaited(self._tracks)

    def awaits(self, source: int) -> bool:
        """Tells whether more must come from a source rank."""
        return self._awaited(key for key in self._tracks if key[0] == source)

    def _awaited(self, keys: Iterable[tuple[int, int]]) -> bool:
        return any(self._tracks[key].first_token < self._tokens.stop for key in keys)

    def begin(self, source: int, piece: Piece) -> memoryview:
        """Returns memory for the body of a piece, which must be filled before :meth:`finish`.

        Raises:
            NotDue: the piece is not the next one of its layer from that source rank.
        """
        track = self._tracks.get((source, piece.layer))
        if track is None:
            raise NotDue(f"rank {source} sent layer {piece.layer}, which is not due from it")
        self._check_portion(track, source, piece)
        total = len(self._layout(source, piece).layers.get(piece.layer, Span(0, 0)))
        left = total - track.num_filled
        if piece.offset != track.num_filled or not (0 < piece.num_bytes <= left or piece.num_bytes == left):
            raise NotDue(
                f"rank {source} sent {piece.num_bytes} bytes from byte {piece.offset} of layer {piece.layer}, tokens "
                f"{piece.portion}, where byte {track.num_filled} of {total} was due"
            )
        if track.memory is None:
            track.memory = bytearray(total)
        self._stops[piece.first_token] = piece.stop_token
        return memoryview(track.memory)[piece.offset : piece.offset + piece.num_bytes]

    def _check_portion(self, track: _Track, source: int, piece: Piece) -> None:
        """Raises NotDue where the portion is not the track's next one, or another rank has cut it differently."""
        first, stop = piece.portion
        due_stop = self._stops.get(first, stop)
        is_within = first < stop <= self._tokens.stop and stop - first <= PORTION_TOKENS
        if first != track.first_token or stop != due_stop or not is_within:
            raise NotDue(
                f"rank {source} sent tokens {first} to {stop} of layer {piece.layer}, where those from "
                f"{track.first_token} on were due, of {self._tokens.stop}"
            )

    def _layout(self, source: int, piece: Piece) -> MessageLayout:
        try:
            return self._layouts.of(Span(*piece.portion), source=source, target=self._rank)
        except InvalidRequest as error:
            raise NotDue(str(error)) from error

    def finish(self, source: int, piece: Piece) -> LayerPortion | None:
        """Notes that a piece has come, and returns its layer of the portion where that is whole, and not empty."""
        track = self._tracks[source, piece.layer]
        assert track.memory is not None
        track.num_filled += piece.num_bytes
        self.num_bytes += piece.num_bytes
        memory = track.memory
        if track.num_filled < len(memory):
            return None
        track.first_token, track.num_filled, track.memory = piece.stop_token, 0, None
        if not memory:
            return None
        return LayerPortion(piece.layer, Span(*piece.portion), self._layout(source, piece), memory)
