"""Chooses in which region of the KV blocks a sequence gets its blocks, and keeps what each region has to give.

The blocks of one region have the same holders (placement.planning.residency). A sequence whose blocks are all in one
region is attended to in one place, so a sequence that grows stays where its last block is. A new one goes where the
replica's own ranks hold the blocks, as long as there is room, and else to the attention worker that has the most left
of what it has. What finds no room overflows into the next region.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from placement.planning.residency import Residency
from placement.serving.kv.intervals import FreeIntervals

# Eviction frees at least one in so many blocks of a region, where as many are cached: freed one by one they would
# come in the order in which sequences ended, from their ends, and cut what grows into runs of one block.
_EVICTION_SHARE = 32


class RegionBlocks:
    """Holds the blocks of a region that nobody refers to.

    Attributes:
        is_local: whether the replica's own ranks hold the region.
        size: how many blocks the region has.
        free: its free blocks.
        cached: its blocks that have a name alone, the least recently used first.
    """

    def __init__(self, start: int, stop: int, *, is_local: bool) -> None:
        self.is_local = is_local
        self.size = stop - start
        self.free = FreeIntervals(self.size, start)
        self.cached: OrderedDict[int, None] = OrderedDict()

    @property
    def room(self) -> int:
        """Counts the blocks that can be allocated."""
        return self.free.num_blocks + len(self.cached)

    @property
    def share(self) -> float:
        """Returns how much of the region can be allocated, from 0 to 1."""
        return self.room / self.size

    def to_evict(self, count: int) -> int:
        """Returns how many cached blocks are to be freed so that ``count`` blocks can be taken."""
        missing = count - self.free.num_blocks
        return 0 if missing <= 0 else min(max(missing, self.size // _EVICTION_SHARE), len(self.cached))


class Regions:
    """Holds the regions of a pool, in the order of their blocks."""

    def __init__(self, residency: Residency) -> None:
        spans = [region.blocks for region in residency.regions]
        self.all = [
            RegionBlocks(span.start, span.stop, is_local=region.is_local)
            for span, region in zip(spans, residency.regions, strict=True)
        ]
        self._stops = [span.stop for span in spans]

    @property
    def num_free(self) -> int:
        """Counts the blocks that nobody refers to, cached ones included."""
        return sum(region.room for region in self.all)

    @property
    def num_cached(self) -> int:
        """Counts the blocks that have a name alone."""
        return sum(len(region.cached) for region in self.all)

    def of(self, block: int) -> RegionBlocks:
        """Returns the region of a block."""
        return self.all[bisect_right(self._stops, block)]

    def deal(self, count: int, *, after: int | None) -> Iterator[tuple[RegionBlocks, int]]:
        """Yields the regions that ``count`` blocks are taken from, and how many of each. There must be as many.

        Among attention workers, one that has room for all is preferred: the attention of a sequence that is in one
        place need not be merged.

        Args:
            after: the last block of the sequence that grows; None for a new sequence.
        """
        stays = None if after is None else self.of(after)
        if stays is not None and count <= stays.room:
            yield stays, count
            return
        for region in self._preferred(stays, count):
            taken = min(count, region.room)
            if taken:
                yield region, taken
            count -= taken
        assert not count, count

    def _preferred(self, stays: RegionBlocks | None, count: int) -> Iterator[RegionBlocks]:
        """Yields the regions in the order in which ``count`` blocks fill them, ``stays`` first."""
        local = self.all[:1] if self.all[0].is_local else []
        first = local if stays is None else [stays, *(region for region in local if region is not stays)]
        rest = count - sum(region.room for region in first)
        remote = [region for region in self.all if region not in first]
        remote.sort(key=lambda region: (region.room >= rest, region.share), reverse=True)
        return chain(first, remote)
