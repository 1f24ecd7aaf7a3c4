"""Finds what each session with an attention worker is to do in a micro-batch, and what the model rank does itself.

A token's keys and values go to the holders of its block. A chunk at the start of a sequence sees itself alone, so the
model rank attends to it and only hands keys and values over. All other tokens are attended to wherever some of what
they see is: by a session finally where it has all of it, and in parts otherwise, which the model rank merges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from placement.model.part import Span
from placement.planning.residency import Holder, Region, Residency
from placement.serving.offload.orders import QuerySpan, Seen

Integers = NDArray[np.int64]
Rows = Integers | list[int]
Window = int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A sequence's tokens of a step.

    Attributes:
        sequence: what the attention workers know the sequence by.
        first_row: the row of its first token in the micro-batch.
        start: the position of that token.
        num_tokens: how many tokens the step computes.
        blocks: the blocks of the sequence up to the last of these tokens.
        home: where all of them are with one worker for each head; None: they are not. See :func:`find_home`.
    """

    sequence: int
    first_row: int
    start: int
    num_tokens: int
    blocks: Integers
    home: "Home | None" = None

    @property
    def stop(self) -> int:
        """Returns the position behind its last token."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """The one region, not local and not divided by slots, that all blocks of a sequence are in.

    Attributes:
        region: its place in the residency.
        table: the blocks, counted from the region's first.
    """

    region: int
    table: tuple[int, ...]


def find_home(blocks: Integers, residency: Residency, block_size: int) -> Home | None:
    """Returns the one region that a sequence's blocks are in, where there is one."""
    first, last = int(blocks.min()), int(blocks.max())
    for place, region in enumerate(residency.regions):
        if region.blocks.start <= first and last < region.blocks.stop:
            if region.is_local or not _is_undivided(region, block_size):
                return None
            return Home(region=place, table=tuple((blocks - region.blocks.start).tolist()))
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPlace:
    """Describes what a session is of a model rank's work.

    Attributes:
        region: the place of its region in the residency.
        kv_heads: the KV heads that it has, counted from the rank's first.
    """

    region: int
    holder: Holder
    kv_heads: Span


def session_places(residency: Residency, kv_heads: Span) -> tuple[SessionPlace, ...]:
    """Lists the sessions of a model rank that has some KV heads of the model, in the order in which parts are merged.

    A worker that holds two regions has a session for each.
    """
    found = []
    for place, region in enumerate(residency.regions):
        for holder in region.holders:
            first, stop = max(holder.kv_heads.start, kv_heads.start), min(holder.kv_heads.stop, kv_heads.stop)
            if first < stop:
                own = Span(first - kv_heads.start, stop - kv_heads.start)
                found.append(SessionPlace(region=place, holder=holder, kv_heads=own))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """What one holder has of a sequence.

    Attributes:
        places: the places in the sequence of the blocks of the region, ascending.
        start, width: of each block, the first slot that it holds, and how many.
    """

    places: Integers
    start: int
    width: int
    block_size: int

    def count(self, positions: Integers) -> Integers:
        """Counts for each position the tokens before it that the holder has."""
        block, offset = np.divmod(positions, self.block_size)
        full = np.searchsorted(self.places, block)
        is_here = np.zeros(len(positions), dtype=bool)
        known = full < len(self.places)
        is_here[known] = self.places[full[known]] == block[known]
        within = np.where(is_here, (offset - self.start).clip(0, self.width), 0)
        counted: Integers = full * self.width + within
        return counted


def resident(chunk: Chunk, region: Region, holder: Holder | None, block_size: int) -> Resident:
    """Returns what a holder has of a sequence; None: the model rank itself, of a local region."""
    inside = (chunk.blocks >= region.blocks.start) & (chunk.blocks < region.blocks.stop)
    stripe = None if holder is None else holder.stripe
    return Resident(
        places=np.flatnonzero(inside),
        start=0 if stripe is None else stripe.start,
        width=block_size if stripe is None else stripe.width,
        block_size=block_size,
    )


def seen_of(held: Resident, positions: Integers, windows: Sequence[Window]) -> list[Integers]:
    """Returns for each window what the tokens at some positions see of what is held, [n, 2] with first and end."""
    end = held.count(positions + 1)
    found = []
    for window in windows:
        first = np.zeros_like(end) if window is None else held.count((positions + 1 - window).clip(0))
        found.append(np.stack([first, end], axis=1))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSight:
    """What a session does in a micro-batch.

    Attributes:
        spans: its rows of queries: first those that it answers finally.
        num_whole: how many rows it answers finally.
        query_rows: the rows of the micro-batch that these are.
        kv_rows: the rows whose keys and values it stores, and ``slots``, where.
        tables: the blocks of each sequence that it has to know, counted from the region's first.
    """

    spans: tuple[QuerySpan, ...]
    num_whole: int
    query_rows: Integers
    kv_rows: Integers
    slots: Integers
    tables: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSpan:
    """Rows that the model rank attends to itself, over its own slots.

    Attributes:
        runs: slots of the tokens that are here, in order, as runs [R, 2].
        seen: for each window what each row sees of them, [n, 2].
    """

    first_row: int
    runs: Integers
    seen: tuple[Integers, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What is done in a micro-batch.

    Attributes:
        slots: the slot of the model rank's cache that each row's keys and values are written to.
        local: what the rank attends to itself.
        local_rows: the rows that nobody else attends to.
        part_rows: the rows that several attend to, whose parts are merged.
        sessions: by session.
    """

    slots: Integers
    local: tuple[LocalSpan, ...]
    local_rows: Integers
    part_rows: Integers
    sessions: tuple[SessionSight, ...]

    @property
    def is_awaited(self) -> bool:
        """Tells whether some session answers."""
        return any(session.spans for session in self.sessions)


def look(
    chunks: Sequence[Chunk],
    residency: Residency,
    places: Sequence[SessionPlace],
    windows: Sequence[Window],
    *,
    block_size: int,
    first_staged: int,
) -> Sight:
    """Finds what is done in a micro-batch.

    Args:
        windows: those of the layers, each once.
        first_staged: the slot that the keys and values of the first row are staged in, where others hold them; those of
            the rows after it follow.
    """
    num_rows = sum(chunk.num_tokens for chunk in chunks)
    slots = np.arange(first_staged, first_staged + num_rows)
    drafts = [_Draft() for _ in places]
    local: list[LocalSpan] = []
    local_rows: list[Integers] = []
    part_rows: list[Integers] = []
    for chunk in chunks:
        if chunk.home is not None and chunk.num_tokens == 1 and chunk.start:
            _ask_at_home(drafts, places, chunk, chunk.home, windows, block_size)
            continue
        rows = np.arange(chunk.first_row, chunk.first_row + chunk.num_tokens)
        positions = np.arange(chunk.start, chunk.stop)
        regions = _regions(chunk, residency)
        own = _is_local(chunk, residency, positions, block_size)
        slots[rows[own]] = _local_slots(chunk, positions[own], block_size)
        stored = [
            _store(draft, chunk, place, residency, rows, positions, block_size)
            for draft, place in zip(drafts, places, strict=True)
        ]
        if chunk.start == 0:
            local.append(_whole_span(chunk, slots[rows], windows))
            local_rows.append(rows)
            continue
        if regions == {0} and residency.regions[0].is_local:
            local.append(_local_span(chunk, residency, windows, positions, block_size))
            local_rows.append(rows)
            continue
        is_whole = len(regions) == 1 and _is_undivided(residency.regions[min(regions)], block_size)
        for draft, place, held in zip(drafts, places, stored, strict=True):
            _ask(draft, chunk, place, held, rows, positions, windows, is_whole=is_whole)
        if is_whole:
            continue
        part_rows.append(rows)
        if 0 in regions and residency.regions[0].is_local:
            local.append(_local_span(chunk, residency, windows, positions, block_size))
    return Sight(
        slots=slots,
        local=tuple(local),
        local_rows=_joined(local_rows),
        part_rows=_joined(part_rows),
        sessions=tuple(draft.sight() for draft in drafts),
    )


class _Draft:
    """Collects what a session does."""

    def __init__(self) -> None:
        self.whole: list[tuple[QuerySpan, Rows]] = []
        self.parts: list[tuple[QuerySpan, Rows]] = []
        self.kv_rows: list[Rows] = []
        self.slots: list[Rows] = []
        self.tables: dict[int, tuple[int, ...]] = {}

    def sight(self) -> SessionSight:
        spans = [*self.whole, *self.parts]
        return SessionSight(
            spans=tuple(span for span, _ in spans),
            num_whole=sum(span.num_queries for span, _ in self.whole),
            query_rows=_joined([rows for _, rows in spans]),
            kv_rows=_joined(self.kv_rows),
            slots=_joined(self.slots),
            tables=self.tables,
        )


def _ask_at_home(
    drafts: Sequence[_Draft],
    places: Sequence[SessionPlace],
    chunk: Chunk,
    home: Home,
    windows: Sequence[Window],
    block_size: int,
) -> None:
    """Notes a decode whose sequence is at one place, as most are, without any array."""
    position, row = chunk.start, [chunk.first_row]
    end = position + 1
    seen = tuple(((0 if window is None else max(0, end - window), end),) for window in windows)
    span = QuerySpan(sequence=chunk.sequence, num_queries=1, num_new=1, seen=seen)
    slot = [home.table[position // block_size] * block_size + position % block_size]
    for draft, place in zip(drafts, places, strict=True):
        if place.region == home.region:
            draft.whole.append((span, row))
            draft.kv_rows.append(row)
            draft.slots.append(slot)
            draft.tables[chunk.sequence] = home.table


def _joined(found: Sequence[Rows]) -> Integers:
    return np.array(list(chain.from_iterable(found)), np.int64)


def _regions(chunk: Chunk, residency: Residency) -> set[int]:
    """Returns the places of the regions that the sequence has blocks in."""
    stops = np.array([region.blocks.stop for region in residency.regions])
    return set(np.searchsorted(stops, chunk.blocks, side="right").tolist())


def _is_undivided(region: Region, block_size: int) -> bool:
    """Tells whether each head of a region's blocks is held by one worker as a whole."""
    return all(holder.slots_per_block(block_size) == block_size for holder in region.holders)


def _is_local(chunk: Chunk, residency: Residency, positions: Integers, block_size: int) -> NDArray[np.bool_]:
    here: NDArray[np.bool_] = chunk.blocks[positions // block_size] < residency.num_local_blocks
    return here


def _local_slots(chunk: Chunk, positions: Integers, block_size: int) -> Integers:
    slots: Integers = chunk.blocks[positions // block_size] * block_size + positions % block_size
    return slots


def _store(
    draft: _Draft,
    chunk: Chunk,
    place: SessionPlace,
    residency: Residency,
    rows: Integers,
    positions: Integers,
    block_size: int,
) -> Resident:
    """Notes the keys and values of a chunk that a session stores, and returns what it holds of the sequence."""
    region = residency.regions[place.region]
    held = resident(chunk, region, place.holder, block_size)
    blocks, offsets = chunk.blocks[positions // block_size], positions % block_size - held.start
    own = (blocks >= region.blocks.start) & (blocks < region.blocks.stop) & (offsets >= 0) & (offsets < held.width)
    if own.any():
        draft.kv_rows.append(rows[own])
        draft.slots.append((blocks[own] - region.blocks.start) * held.width + offsets[own])
    if chunk.start and len(held.places):
        draft.tables[chunk.sequence] = tuple((chunk.blocks[held.places] - region.blocks.start).tolist())
    return held


def _ask(
    draft: _Draft,
    chunk: Chunk,
    place: SessionPlace,
    held: Resident,
    rows: Integers,
    positions: Integers,
    windows: Sequence[Window],
    *,
    is_whole: bool,
) -> None:
    """Notes the queries of a chunk that a session answers; none where they see nothing of what it holds."""
    seen = seen_of(held, positions, windows)
    if not any((ranges[:, 0] < ranges[:, 1]).any() for ranges in seen):
        return
    before, after = held.count(np.array([chunk.start, chunk.stop])).tolist()
    span = QuerySpan(
        sequence=chunk.sequence, num_queries=chunk.num_tokens, num_new=after - before, seen=tuple(map(_seen, seen))
    )
    (draft.whole if is_whole else draft.parts).append((span, rows))


def _seen(ranges: Integers) -> Seen:
    return tuple(map(tuple, ranges.tolist()))


def _whole_span(chunk: Chunk, slots: Integers, windows: Sequence[Window]) -> LocalSpan:
    """Returns the span of a chunk that sees itself alone."""
    positions = np.arange(chunk.num_tokens)
    seen = [
        np.stack([np.zeros_like(positions) if window is None else (positions + 1 - window).clip(0), positions + 1], 1)
        for window in windows
    ]
    return LocalSpan(first_row=chunk.first_row, runs=_runs(slots), seen=tuple(seen))


def _local_span(
    chunk: Chunk, residency: Residency, windows: Sequence[Window], positions: Integers, block_size: int
) -> LocalSpan:
    """Returns the span of a chunk over the blocks that are local."""
    held = resident(chunk, residency.regions[0], None, block_size)
    blocks = chunk.blocks[held.places]
    num_tokens = int(held.count(np.array([chunk.stop]))[0])
    starts = blocks * block_size
    runs = np.stack([starts, starts + block_size], axis=1)
    if len(runs):
        runs[-1, 1] -= len(runs) * block_size - num_tokens
    return LocalSpan(first_row=chunk.first_row, runs=runs, seen=tuple(seen_of(held, positions, windows)))


def _runs(slots: Integers) -> Integers:
    """Returns slots as runs [R, 2]."""
    cuts = np.flatnonzero(np.diff(slots) != 1) + 1
    starts, stops = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(slots)]])
    return np.stack([slots[starts], slots[stops - 1] + 1], axis=1)
