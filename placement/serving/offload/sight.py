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

from placement.planning.residency import Residency
from placement.serving.offload.orders import QuerySpan, Seen
from placement.serving.offload.residents import (
    Chunk,
    Home,
    Integers,
    Resident,
    SessionPlace,
    Window,
    is_undivided,
    resident,
    seen_of,
)

Rows = Integers | list[int]


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
    found = _Search(residency, tuple(places), tuple(windows), block_size, slots=first_staged + np.arange(num_rows))
    for chunk in chunks:
        found.add(chunk)
    return found.sight()


class _Search:
    """Collects what is done in a micro-batch, chunk by chunk."""

    def __init__(
        self,
        residency: Residency,
        places: tuple[SessionPlace, ...],
        windows: tuple[Window, ...],
        block_size: int,
        *,
        slots: Integers,
    ) -> None:
        self._residency = residency
        self._places = places
        self._windows = windows
        self._block_size = block_size
        self._slots = slots
        self._drafts = [_Draft() for _ in places]
        self._local: list[LocalSpan] = []
        self._local_rows: list[Integers] = []
        self._part_rows: list[Integers] = []

    def add(self, chunk: Chunk) -> None:
        """Finds what is done with a chunk."""
        residency, size = self._residency, self._block_size
        if chunk.home is not None and chunk.num_tokens == 1 and chunk.start:
            _ask_at_home(self._drafts, self._places, chunk, chunk.home, self._windows, size)
            return
        rows = np.arange(chunk.first_row, chunk.first_row + chunk.num_tokens)
        positions = np.arange(chunk.start, chunk.stop)
        own = _is_local(chunk, residency, positions, size)
        self._slots[rows[own]] = _local_slots(chunk, positions[own], size)
        stored = [
            _store(draft, chunk, place, residency, rows, positions, size)
            for draft, place in zip(self._drafts, self._places, strict=True)
        ]
        if chunk.start == 0:
            self._local.append(_whole_span(chunk, self._slots[rows], self._windows))
            self._local_rows.append(rows)
        else:
            self._ask(chunk, rows, positions, stored)

    def _ask(self, chunk: Chunk, rows: Integers, positions: Integers, stored: Sequence[Resident]) -> None:
        """Finds who attends to a chunk that sees earlier tokens."""
        residency, size, windows = self._residency, self._block_size, self._windows
        regions = _regions(chunk, residency)
        is_here = 0 in regions and residency.regions[0].is_local
        if is_here:
            self._local.append(_local_span(chunk, residency, windows, positions, size))
        if is_here and len(regions) == 1:
            self._local_rows.append(rows)
            return
        is_whole = len(regions) == 1 and is_undivided(residency.regions[min(regions)], size)
        for draft, held in zip(self._drafts, stored, strict=True):
            draft.ask(chunk, held, rows, positions, windows, is_whole=is_whole)
        if not is_whole:
            self._part_rows.append(rows)

    def sight(self) -> Sight:
        """Returns what was found."""
        return Sight(
            slots=self._slots,
            local=tuple(self._local),
            local_rows=_joined(self._local_rows),
            part_rows=_joined(self._part_rows),
            sessions=tuple(draft.sight() for draft in self._drafts),
        )


class _Draft:
    """Collects what a session does."""

    def __init__(self) -> None:
        self.whole: list[tuple[QuerySpan, Rows]] = []
        self.parts: list[tuple[QuerySpan, Rows]] = []
        self.kv_rows: list[Rows] = []
        self.slots: list[Rows] = []
        self.tables: dict[int, tuple[int, ...]] = {}

    def ask(
        self,
        chunk: Chunk,
        held: Resident,
        rows: Integers,
        positions: Integers,
        windows: Sequence[Window],
        *,
        is_whole: bool,
    ) -> None:
        """Notes the queries of a chunk that the session answers; none where they see nothing of what it holds."""
        seen = seen_of(held, positions, windows)
        if not any((ranges[:, 0] < ranges[:, 1]).any() for ranges in seen):
            return
        before, after = held.count(np.array([chunk.start, chunk.stop])).tolist()
        span = QuerySpan(
            sequence=chunk.sequence, num_queries=chunk.num_tokens, num_new=after - before, seen=tuple(map(_seen, seen))
        )
        (self.whole if is_whole else self.parts).append((span, rows))

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
