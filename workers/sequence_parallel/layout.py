"""Distributes a step over ranks that share sequences: which rows each rank computes, and whose KV they see. Pure.

All ranks compute a chunk of few tokens, such as every decode, whole: each attends to the KV that it holds, and one
exchange combines the results at all ranks. Of a longer chunk, each rank computes the tokens whose KV it holds; the
chunk is then called split.
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
class ChunkShare:
    """A rank's share of a sequence's chunk.

    Attributes:
        first_row: the row of its first token in the rank's batch.
        positions: the positions of its tokens in the sequence.
        is_whole: whether all ranks compute the whole chunk.
    """

    sequence: SequenceInput
    first_row: int
    positions: Integers
    is_whole: bool

    @property
    def stop(self) -> int:
        """Returns the position after the chunk's last token, over all ranks."""
        return self.sequence.start + self.sequence.num_tokens


def chunk_shares(batch: Batch, stripe: Stripe) -> tuple[ChunkShare, ...]:
    """Returns the shares of the rank with that stripe, one for each sequence; some may be empty."""
    result: list[ChunkShare] = []
    row = 0
    for sequence in batch.sequences:
        stop = sequence.start + sequence.num_tokens
        is_whole = sequence.num_tokens <= WHOLE_TOKENS
        positions = np.arange(sequence.start, stop) if is_whole else stripe.positions(sequence.start, stop)
        result.append(ChunkShare(sequence=sequence, first_row=row, positions=positions, is_whole=is_whole))
        row += len(positions)
    return tuple(result)


def split_rows(shares: Sequence[ChunkShare]) -> list[int]:
    """Returns the rows of a rank's batch that no other rank computes, given its shares."""
    return _rows(share for share in shares if not share.is_whole)


def whole_rows(shares: Sequence[ChunkShare]) -> list[int]:
    """Returns the rows of a rank's batch that all ranks compute, given its shares."""
    return _rows(share for share in shares if share.is_whole)


def _rows(shares: Iterable[ChunkShare]) -> list[int]:
    return [share.first_row + i for share in shares for i in range(len(share.positions))]


def local_runs(batch: Batch, stripe: Stripe) -> tuple[Integers, ...]:
    """Returns, for each sequence, the runs [R, 2] of the rank's own slots up to the chunk's last token."""
    all_runs = (np.fromiter(chain.from_iterable(s.runs), np.int64).reshape(-1, 2) for s in batch.sequences)
    return tuple(stripe.runs(runs) for runs in all_runs)


def own_spans(
    shares: Sequence[ChunkShare],
    runs: Sequence[Integers],
    stripe: Stripe,
    window: Window,
    shared: Sequence[SharedSpan] = (),
) -> tuple[list[PartSpan], list[SharedSpan]]:
    """Returns the spans of all rows of a rank over the KV that it holds, and what of that KV they have in common.

    Args:
        shares: the rank's shares.
        runs: the :func:`local_runs` of ``stripe``, here and below.
        shared: the tokens that sequences of the batch have in common.
    """
    spans: dict[int, PartSpan] = {}
    for index, share in enumerate(shares):
        span = _span(share, share.first_row, stripe, window, runs[index], oldest=0)
        if span is not None:
            spans[index] = span
    places = {index: place for place, index in enumerate(spans)}
    local = [_shared(common, stripe, places) for common in shared]
    return list(spans.values()), [common for common in local if common is not None]


def _shared(common: SharedSpan, stripe: Stripe, places: Mapping[int, int]) -> SharedSpan | None:
    """Returns what a rank holds of common tokens, with the members' places among its spans; None where it has none."""
    first = stripe.count(common.first_token)
    count = stripe.count(common.first_token + common.num_tokens) - first
    if not count:
        return None
    members = tuple(places[member] for member in common.members)
    runs = tuple((start, stop) for start, stop in stripe.runs(np.array(common.runs, np.int64)).tolist())
    return SharedSpan(members=members, first_token=first, num_tokens=count, runs=runs)


def visiting_spans(
    others: Sequence[ChunkShare], runs: Sequence[Integers], stripe: Stripe, window: Window
) -> list[PartSpan]:
    """Returns the spans of another rank's split rows over the KV of the rank with ``stripe``.

    The rows lie one after the other, as they are received. ``others`` are the shares of that other rank.
    """
    spans, row = [], 0
    for share, local in zip(others, runs, strict=True):
        if share.is_whole:
            continue
        oldest = _oldest(share, window)
        seen = _without_first(local, stripe.count(oldest))
        span = _span(share, row, stripe, window, seen, oldest=oldest)
        if span is not None:
            spans.append(span)
        row += len(share.positions)
    return spans


def received_spans(shares: Sequence[ChunkShare], sender: Stripe, window: Window) -> list[PartSpan]:
    """Returns the spans of a rank's split rows over KV that another rank sent in the order of :func:`sent_slots`."""
    spans, row, slot = [], 0, 0
    for share in _split(shares):
        count = num_held(share, sender, window)
        runs = np.array([[slot, slot + count]] if count else [], np.int64).reshape(-1, 2)
        span = _span(share, row, sender, window, runs, oldest=_oldest(share, window))
        if span is not None:
            spans.append(span)
        row += len(share.positions)
        slot += count
    return spans


def sent_slots(shares: Sequence[ChunkShare], runs: Sequence[Integers], stripe: Stripe, window: Window) -> Integers:
    """Returns the slots of what a rank holds of all that split rows see, sequence after sequence."""
    sent = [
        slots_of(_without_first(local, stripe.count(_oldest(share, window))))
        for share, local in zip(shares, runs, strict=True)
        if not share.is_whole
    ]
    return np.concatenate([np.empty(0, np.int64), *sent])


def num_held(share: ChunkShare, stripe: Stripe, window: Window) -> int:
    """Returns how many of the tokens that some token of the chunk sees the rank with ``stripe`` holds."""
    return stripe.count(share.stop) - stripe.count(_oldest(share, window))


def last_slots(runs: Integers, count: int) -> Integers:
    """Returns the last ``count`` slots in ``runs`` [R, 2]."""
    return slots_of(_without_first(runs, num_slots_of(runs) - count))


def _without_first(runs: Integers, count: int) -> Integers:
    """Returns ``runs`` [R, 2] without their first ``count`` slots."""
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
    """Returns the sizes of what a layer exchanges of split chunks, for the window that exchanges most."""
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


def _split(shares: Sequence[ChunkShare]) -> list[ChunkShare]:
    return [share for share in shares if not share.is_whole]


def _oldest(share: ChunkShare, window: Window) -> int:
    """Returns the position of the first token that any token of the chunk sees."""
    return 0 if window is None else max(0, share.sequence.start + 1 - window)


def _span(
    share: ChunkShare, row: int, stripe: Stripe, window: Window, runs: Integers, *, oldest: int
) -> PartSpan | None:
    """Returns the span of a rank's share of a chunk over the tokens of the rank with ``stripe``.

    Those lie in ``runs`` from position ``oldest`` on. Returns None where either rank has no tokens.
    """
    if not len(share.positions) or not len(runs):
        return None
    stop = share.positions + 1
    start = np.zeros_like(stop) if window is None else (stop - window).clip(min=0)
    seen = np.stack((stripe.counts(start), stripe.counts(stop)), axis=1) - stripe.count(oldest)
    return PartSpan(query_start=row, runs=runs, seen=seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """The rows whose hidden states all ranks need at the end of a step, in the order of :class:`Prepared`.

    Attributes:
        count: the number of needed rows.
        own_rows: the rows of this rank's batch that are among them.
        own_places: the places of ``own_rows`` among the needed rows.
        sent_rows: those of ``own_rows`` that other ranks do not have.
        received_places: by rank, the places of the rows that it sends.
    """

    count: int
    own_rows: tuple[int, ...]
    own_places: tuple[int, ...]
    sent_rows: tuple[int, ...]
    received_places: dict[int, tuple[int, ...]]


def find_needed(batch: Batch, stripes: Sequence[Stripe], rank: int) -> Needed:
    """Finds the needed rows: first those after which a token is sampled, then those that are scored, by sequence."""
    positions = [(i, s.start + s.num_tokens - 1) for i, s in enumerate(batch.sequences) if s.samples]
    for i, sequence in enumerate(batch.sequences):
        if sequence.scored is not None:
            first = sequence.scored.first_index - 1
            positions += [(i, first + k) for k in range(len(sequence.scored.token_ids))]
    own = chunk_shares(batch, stripes[rank])
    owners = _owners(stripes)
    own_rows, own_places, sent_rows = [], [], []
    received: dict[int, list[int]] = {other: [] for other in range(len(stripes)) if other != rank}
    for place, (index, position) in enumerate(positions):
        share, owner = own[index], owners[position % len(owners)]
        if not share.is_whole and owner != rank:
            received[owner].append(place)
            continue
        row = share.first_row + int(np.searchsorted(share.positions, position))
        own_rows.append(row)
        own_places.append(place)
        if not share.is_whole:
            sent_rows.append(row)
    return Needed(
        count=len(positions),
        own_rows=tuple(own_rows),
        own_places=tuple(own_places),
        sent_rows=tuple(sent_rows),
        received_places={other: tuple(places) for other, places in received.items() if places},
    )


def _owners(stripes: Sequence[Stripe]) -> list[int]:
    """Returns the rank that holds each slot of a block."""
    return [rank for rank, stripe in enumerate(stripes) for _ in range(stripe.width)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partners:
    """Which ranks exchange something in a layer.

    Attributes:
        num_queries: the number of split rows of each rank.
        num_kv: how many tokens of each rank any split row sees.
    """

    num_queries: tuple[int, ...]
    num_kv: tuple[int, ...]

    def may_see(self, queries_of: int, kv_of: int) -> bool:
        """Tells whether some of one rank's queries may see some of the other rank's KV."""
        return self.num_queries[queries_of] > 0 and self.num_kv[kv_of] > 0
