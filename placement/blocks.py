"""KV blocks: which are free, who refers to the others, and how long the runs of adjacent blocks get.

Attention reads a run of adjacent blocks as one strided view, so a sequence whose blocks lie in few long runs
is read with few kernel calls and without a gather. Nothing is ever moved, hence placement has to leave room
ahead:

- a growing sequence takes the blocks right after its last one while they are free;
- everything else goes into the largest free interval (worst fit), into its middle: whoever ends where the
  interval starts can go on growing into the first half, the newcomer into the second. Best fit would pack
  tightly and cut every run at the first growth. An interval that starts at block 0 has nobody to its left and
  is filled from 0.
"""

from bisect import bisect_left
from collections.abc import Sequence as Seq
from itertools import pairwise


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for. Internal: the scheduler preempts or waits."""

    def __init__(self, *, wanted: int, free: int) -> None:
        self.wanted = wanted
        self.free = free
        super().__init__(f"{wanted} blocks wanted, {free} free")


class BlockPool:
    """The KV blocks of a replica, with reference counts.

    ``[_starts[i], _stops[i])`` are the free intervals: sorted, disjoint, never touching. ``allocate`` costs
    O(free intervals), which is at most one more than the runs in use.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1 and block_size >= 1, (num_blocks, block_size)
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._num_free = num_blocks
        self._starts = [0]
        self._stops = [num_blocks]

    @property
    def num_total(self) -> int:
        """Blocks there are."""
        return len(self._refs)

    @property
    def num_free(self) -> int:
        """Blocks that nobody refers to."""
        return self._num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int) -> bool:
        """Whether ``allocate(count)`` would succeed."""
        return count <= self._num_free

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Takes ``count`` blocks, with one reference each, in the order in which they are to be filled.

        Args:
            after: last block of the sequence that grows; absent for a new sequence.

        Raises:
            OutOfBlocks: fewer than ``count`` are free; then none is taken.
        """
        assert count >= 0, count
        if count > self._num_free:
            raise OutOfBlocks(wanted=count, free=self._num_free)
        blocks: list[int] = []
        while len(blocks) < count:
            taken = self._take_run(count - len(blocks), blocks[-1] if blocks else after)
            blocks.extend(taken)
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, blocks: Seq[int]) -> None:
        """Adds one reference to each; all must be in use."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} is free"
            self._refs[block] += 1

    def release(self, blocks: Seq[int]) -> None:
        """Drops one reference from each; a block without references is free again."""
        for block in blocks:
            assert self._refs[block] > 0, f"block {block} is free already"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._give_back(block)

    def check(self) -> None:
        """Asserts what must always hold."""
        assert len(self._starts) == len(self._stops)
        intervals = list(zip(self._starts, self._stops, strict=True))
        assert all(0 <= start < stop <= self.num_total for start, stop in intervals), intervals
        assert all(left[1] < right[0] for left, right in pairwise(intervals)), intervals
        free = {block for start, stop in intervals for block in range(start, stop)}
        assert free == {block for block, refs in enumerate(self._refs) if refs == 0}
        assert all(refs >= 0 for refs in self._refs)
        assert len(free) == self._num_free

    def _take_run(self, count: int, after: int | None) -> range:
        """Takes one run of at most ``count`` blocks: behind ``after``, else in the largest interval."""
        if after is not None:
            index = bisect_left(self._starts, after + 1)
            if index < len(self._starts) and self._starts[index] == after + 1:
                return self._cut(index, after + 1, count)
        index = max(range(len(self._starts)), key=lambda i: self._stops[i] - self._starts[i])
        start, stop = self._starts[index], self._stops[index]
        room = max(0, stop - start - count)
        return self._cut(index, start if start == 0 else start + room // 2, count)

    def _cut(self, index: int, first: int, count: int) -> range:
        """Takes ``[first, first + count)``, or what interval ``index`` has of it."""
        start, stop = self._starts[index], self._stops[index]
        last = min(first + count, stop)
        rest = [(a, b) for a, b in ((start, first), (last, stop)) if a < b]
        self._starts[index : index + 1] = [a for a, _ in rest]
        self._stops[index : index + 1] = [b for _, b in rest]
        self._num_free -= last - first
        return range(first, last)

    def _give_back(self, block: int) -> None:
        """Returns ``block`` to the free intervals, joined with those it touches."""
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
        self._num_free += 1


def block_runs(block_table: Seq[int], block_size: int, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """The KV slots of a sequence's first ``num_tokens`` tokens, as ranges ``[start, stop)`` in token order.

    Slot ``block * block_size + offset``. Blocks that follow each other in the table and in the pool make one
    range.
    """
    assert 0 <= num_tokens <= len(block_table) * block_size, (num_tokens, len(block_table), block_size)
    runs: list[tuple[int, int]] = []
    for first_token in range(0, num_tokens, block_size):
        start = block_table[first_token // block_size] * block_size
        stop = start + min(block_size, num_tokens - first_token)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return tuple(runs)
