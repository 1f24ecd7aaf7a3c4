"""How a step is spread over ranks that share sequences: which rows each computes, and whose KV they see. Pure.

A chunk of few tokens, as every decode is, is computed by all ranks: each attends to the KV it has, and one exchange
gives all of them the whole. Of longer chunks each rank computes the tokens whose KV it holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from kernels.attention import PartSpan, SharedSpan, Window, num_slots_of, slots_of
from placement.measured.exchange import ExchangeSizes
from placement.model.striping import WHOLE_TOKENS, Integers, Stripe
from workers.step.types import Batch, SequenceInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a rank computes of a sequence's chunk.

    Attributes:
        first_row: of its tokens in the rank's batch.
        positions: of these in the sequence.
        is_whole: all ranks compute all of it.
    """

    sequence: SequenceInput
    first_row: int
    positions: Integers
    is_whole: bool

    @property
    def stop(self) -> int:
        """The end of the chunk, over all ranks."""
        return self.sequence.start + self.sequence.num_tokens


def pieces(batch: Batch, stripe: Stripe) -> tuple[Piece, ...]:
    """What the rank with that stripe computes of each sequence; nothing of some, perhaps."""
    result: list[Piece] = []
    row = 0
    for sequence in batch.sequences:
        stop = sequence.start + sequence.num_tokens
        is_whole = sequence.num_tokens <= WHOLE_TOKENS
        positions = np.arange(sequence.start, stop) if is_whole else stripe.positions(sequence.start, stop)
        result.append(Piece(sequence=sequence, first_row=row, positions=positions, is_whole=is_whole))
        row += len(positions)
    return tuple(result)


def split_rows(its_pieces: Sequence[Piece]) -> list[int]:
    """Rows of the rank's batch that no other rank computes."""
    return _rows(piece for piece in its_pieces if not piece.is_whole)


def whole_rows(its_pieces: Sequence[Piece]) -> list[int]:
    """Rows of the rank's batch that all ranks compute."""
    return _rows(piece for piece in its_pieces if piece.is_whole)


def _rows(some: Iterable[Piece]) -> list[int]:
    return [piece.first_row + i for piece in some for i in range(len(piece.positions))]


def local_runs(batch: Batch, stripe: Stripe) -> tuple[Integers, ...]:
    """Where the rank has what is its own of each sequence's tokens, up to the chunk's last: runs [R, 2]."""
    every = (np.fromiter(chain.from_iterable(s.runs), np.int64).reshape(-1, 2) for s in batch.sequences)
    return tuple(stripe.runs(runs) for runs in every)


def own_spans(
    its_pieces: Sequence[Piece],
    runs: Sequence[Integers],
    stripe: Stripe,
    window: Window,
    shared: Sequence[SharedSpan] = (),
) -> tuple[list[PartSpan], list[SharedSpan]]:
    """All of a rank's rows against the KV that it has itself; and, of ``shared``, what of that the spans share.

    Args:
        runs: :func:`local_runs` of ``stripe``, here and below.
    """
    spans: dict[int, PartSpan] = {}
    for index, piece in enumerate(its_pieces):
        span = _span(piece, piece.first_row, stripe, window, runs[index], oldest=0)
        if span is not None:
            spans[index] = span
    places = {index: place for place, index in enumerate(spans)}
    local = [_shared(common, stripe, places) for common in shared]
    return list(spans.values()), [common for common in local if common is not None]


def _shared(common: SharedSpan, stripe: Stripe, places: Mapping[int, int]) -> SharedSpan | None:
    """What a rank has of tokens that sequences share; those are now called by their places among its spans."""
    first = stripe.count(common.first_token)
    count = stripe.count(common.first_token + common.num_tokens) - first
    if not count:
        return None
    members = tuple(places[member] for member in common.members)
    runs = tuple((start, stop) for start, stop in stripe.runs(np.array(common.runs, np.int64)).tolist())
    return SharedSpan(members=members, first_token=first, num_tokens=count, runs=runs)


def visiting_spans(others: Sequence[Piece], runs: Sequence[Integers], stripe: Stripe, window: Window) -> list[PartSpan]:
    """Queries of another rank's split rows, side by side, against the KV that the rank with ``stripe`` has."""
    spans, row = [], 0
    for piece, its_runs in zip(others, runs, strict=True):
        if piece.is_whole:
            continue
        oldest = _oldest(piece, window)
        seen = _without_first(its_runs, stripe.count(oldest))
        span = _span(piece, row, stripe, window, seen, oldest=oldest)
        if span is not None:
            spans.append(span)
        row += len(piece.positions)
    return spans


def received_spans(its_pieces: Sequence[Piece], sender: Stripe, window: Window) -> list[PartSpan]:
    """A rank's split rows, side by side, against the KV that another sent: :func:`sent_slots`, side by side."""
    spans, row, slot = [], 0, 0
    for piece in _split(its_pieces):
        count = num_held(piece, sender, window)
        runs = np.array([[slot, slot + count]] if count else [], np.int64).reshape(-1, 2)
        span = _span(piece, row, sender, window, runs, oldest=_oldest(piece, window))
        if span is not None:
            spans.append(span)
        row += len(piece.positions)
        slot += count
    return spans


def sent_slots(its_pieces: Sequence[Piece], runs: Sequence[Integers], stripe: Stripe, window: Window) -> Integers:
    """Slots of what a rank has of all that split rows see, sequence after sequence."""
    sent = [
        slots_of(_without_first(its_runs, stripe.count(_oldest(piece, window))))
        for piece, its_runs in zip(its_pieces, runs, strict=True)
        if not piece.is_whole
    ]
    return np.concatenate([np.empty(0, np.int64), *sent])


def num_held(piece: Piece, stripe: Stripe, window: Window) -> int:
    """How many of the tokens that some token of the chunk sees the rank with ``stripe`` has."""
    return stripe.count(piece.stop) - stripe.count(_oldest(piece, window))


def last_slots(runs: Integers, count: int) -> Integers:
    """The last slots in ``runs`` [R, 2]."""
    return slots_of(_without_first(runs, num_slots_of(runs) - count))


def _without_first(runs: Integers, count: int) -> Integers:
    """``runs`` [R, 2] without their first slots."""
    if not count:
        return runs
    ends = (runs[:, 1] - runs[:, 0]).cumsum()
    at = int(np.searchsorted(ends, count, side="right"))
    rest = runs[at:].copy()
    if len(rest):
        rest[0, 0] += count - (ends[at - 1] if at else 0)
    return rest


def sizes(
    batch: Batch, stripes: Sequence[Stripe], windows: Sequence[Window], *, query_bytes: int, kv_bytes: int
) -> ExchangeSizes:
    """What is to be exchanged of the split chunks in a layer, of all kinds of windows the one with most."""
    num_queries, num_seen, num_pairs = 0, 0, 0
    for sequence in batch.sequences:
        if sequence.num_tokens <= WHOLE_TOKENS:
            continue
        stop = sequence.start + sequence.num_tokens
        oldest = min((max(0, sequence.start + 1 - window) if window else 0) for window in windows)
        num_queries += sequence.num_tokens
        num_seen += stop - oldest
        num_pairs += sequence.num_tokens * (sequence.start - oldest) + sequence.num_tokens**2 // 2
    return ExchangeSizes(
        shares=tuple(stripe.share for stripe in stripes),
        num_queries=num_queries,
        num_seen=num_seen,
        num_pairs=num_pairs,
        query_bytes=query_bytes,
        kv_bytes=kv_bytes,
    )


def _split(some: Sequence[Piece]) -> list[Piece]:
    return [piece for piece in some if not piece.is_whole]


def _oldest(piece: Piece, window: Window) -> int:
    """Position of the first token that any of the chunk's sees."""
    return 0 if window is None else max(0, piece.sequence.start + 1 - window)


def _span(piece: Piece, row: int, stripe: Stripe, window: Window, runs: Integers, *, oldest: int) -> PartSpan | None:
    """A rank's tokens of a chunk against those of the rank with ``stripe``, in ``runs`` from position ``oldest`` on."""
    if not len(piece.positions) or not len(runs):
        return None
    stop = piece.positions + 1
    start = np.zeros_like(stop) if window is None else (stop - window).clip(min=0)
    seen = np.stack((stripe.counts(start), stripe.counts(stop)), axis=1) - stripe.count(oldest)
    return PartSpan(query_start=row, runs=runs, seen=seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """The rows whose hidden states all ranks need at the end of a step, in the order of :class:`Prepared`.

    Attributes:
        count: of them.
        own_rows, own_places: rows of the rank's batch, and their places among those needed.
        given_rows: of them, the rows that others have not.
        come_places: by rank, the places of what it gives.
    """

    count: int
    own_rows: tuple[int, ...]
    own_places: tuple[int, ...]
    given_rows: tuple[int, ...]
    come_places: dict[int, tuple[int, ...]]


def find_needed(batch: Batch, stripes: Sequence[Stripe], rank: int) -> Needed:
    """Rows after which a token is sampled, then those of what is scored, sequence by sequence."""
    wanted = [(i, s.start + s.num_tokens - 1) for i, s in enumerate(batch.sequences) if s.samples]
    for i, sequence in enumerate(batch.sequences):
        if sequence.scored is not None:
            first = sequence.scored.first_index - 1
            wanted += [(i, first + k) for k in range(len(sequence.scored.token_ids))]
    mine = pieces(batch, stripes[rank])
    owners = _owners(stripes)
    own_rows, own_places, given_rows = [], [], []
    come: dict[int, list[int]] = {other: [] for other in range(len(stripes)) if other != rank}
    for place, (index, position) in enumerate(wanted):
        piece, owner = mine[index], owners[position % len(owners)]
        if not piece.is_whole and owner != rank:
            come[owner].append(place)
            continue
        row = piece.first_row + int(np.searchsorted(piece.positions, position))
        own_rows.append(row)
        own_places.append(place)
        if not piece.is_whole:
            given_rows.append(row)
    return Needed(
        count=len(wanted),
        own_rows=tuple(own_rows),
        own_places=tuple(own_places),
        given_rows=tuple(given_rows),
        come_places={other: tuple(places) for other, places in come.items() if places},
    )


def _owners(stripes: Sequence[Stripe]) -> list[int]:
    """The rank of each slot of a block."""
    return [rank for rank, stripe in enumerate(stripes) for _ in range(stripe.width)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Which ranks have something for each other in a layer.

    Attributes:
        num_queries: split rows of each rank.
        num_kv: tokens of each that any split row sees.
    """

    num_queries: tuple[int, ...]
    num_kv: tuple[int, ...]

    def meets(self, queries_of: int, kv_of: int) -> bool:
        """Whether some of one's queries may see some of the other's KV."""
        return self.num_queries[queries_of] > 0 and self.num_kv[kv_of] > 0
