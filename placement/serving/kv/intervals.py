"""Keeps the free blocks as intervals, and chooses new blocks so that runs of blocks stay long.

Attention reads a run of adjacent blocks as one strided view, so a sequence whose blocks lie in few long runs is read
with few kernel calls and without a gather. Blocks are never moved, so the choice leaves room ahead of sequences:

- a growing sequence takes the blocks right after its last one while they are free;
- everything else goes into the largest free interval (worst fit), into its middle: whoever ends where the interval
  starts can go on growing into the first half, the newcomer into the second. Best fit would pack tightly and cut every
  run at the first growth. An interval that starts at the first block of all has nobody to its left and is filled from
  there.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from operator import sub


class FreeIntervals:
    """Holds the free blocks. The intervals ``[_starts[i], _stops[i])`` are sorted, disjoint and never touch."""

    def __init__(self, num_blocks: int, first: int = 0) -> None:
        """At first the blocks ``[first, first + num_blocks)`` are free, of which there is at least one."""
        self.num_blocks = num_blocks
        self._first = first
        self._starts = [first]
        self._stops = [first + num_blocks]

    def __iter__(self) -> Iterator[int]:
        return chain.from_iterable(map(range, self._starts, self._stops))

    def take_behind(self, block: int, count: int) -> range:
        """Takes at most ``count`` blocks that follow ``block``; none where the next is not free."""
        index = bisect_left(self._starts, block + 1)
        if index < len(self._starts) and self._starts[index] == block + 1:
            return self._cut(index, block + 1, count)
        return range(0)

    def take(self, count: int) -> list[int]:
        """Takes ``count`` blocks: the largest intervals whole, the rest out of the next largest."""
        blocks: list[int] = []
        if not count:
            return blocks
        lengths = list(map(sub, self._stops, self._starts))
        if max(lengths) < count:
            whole: set[int] = set()
            for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
                if len(blocks) + lengths[index] > count:
                    break
                whole.add(index)
                blocks += range(self._starts[index], self._stops[index])
            self._starts = [start for index, start in enumerate(self._starts) if index not in whole]
            self._stops = [stop for index, stop in enumerate(self._stops) if index not in whole]
            self.num_blocks -= len(blocks)
            lengths = [length for index, length in enumerate(lengths) if index not in whole]
        if len(blocks) < count:
            blocks += self._cut_largest(lengths, count - len(blocks))
        return blocks

    def _cut_largest(self, lengths: Sequence[int], count: int) -> range:
        """Takes ``count`` blocks out of the middle of the largest interval, which has as many."""
        index = lengths.index(max(lengths))
        start = self._starts[index]
        return self._cut(index, start if start == self._first else start + (lengths[index] - count) // 2, count)

    def give_back(self, block: int) -> None:
        """Frees ``block``, joined with the intervals that it touches."""
        index = bisect_left(self._starts, block)
        joins_left = index > 0 and self._stops[index - 1] == block
        joins_right = index < len(self._starts) and self._starts[index] == block + 1
        if joins_left and joins_right:
            del self._stops[index - 1], self._starts[index]
        elif joins_left:
            self._stops[index - 1] = block + 1
        elif joins_right:
            self._starts[index] = block
        else:
            self._starts.insert(index, block)
            self._stops.insert(index, block + 1)
        self.num_blocks += 1

    def take_one(self, block: int) -> None:
        """Takes ``block``, which must be free."""
        index = bisect_right(self._starts, block) - 1
        assert index >= 0 and block < self._stops[index], f"block {block} is not free"
        self._cut(index, block, 1)

    def check(self, num_total: int) -> None:
        """Asserts what must always hold, where there are ``num_total`` blocks, free or not."""
        assert len(self._starts) == len(self._stops)
        intervals = list(zip(self._starts, self._stops, strict=True))
        assert all(self._first <= start < stop <= self._first + num_total for start, stop in intervals), intervals
        assert all(left[1] < right[0] for left, right in pairwise(intervals)), intervals
        assert self.num_blocks == sum(stop - start for start, stop in intervals)

    def _cut(self, index: int, first: int, count: int) -> range:
        """Takes ``[first, first + count)`` out of interval ``index``, or as much of it as the interval has."""
        start, stop = self._starts[index], self._stops[index]
        last = min(first + count, stop)
        rest = [(a, b) for a, b in ((start, first), (last, stop)) if a < b]
        self._starts[index : index + 1] = [a for a, _ in rest]
        self._stops[index : index + 1] = [b for _, b in rest]
        self.num_blocks -= last - first
        return range(first, last)
