"""Finds where the blocks of a sequence are, what a holder has of it, and what its tokens see of that."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.model.part import Span
from placement.planning.residency import Holder, Region, Residency

Integers = NDArray[np.int64]
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
            if region.is_local or not is_undivided(region, block_size):
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


def is_undivided(region: Region, block_size: int) -> bool:
    """Tells whether each head of a region's blocks is held by one worker as a whole."""
    return all(holder.slots_per_block(block_size) == block_size for holder in region.holders)
