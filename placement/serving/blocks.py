"""KV blocks: which are free, who refers to the others, what can be found again, how long runs of blocks get.

Attention reads a run of adjacent blocks as one strided view, so a sequence whose blocks lie in few long runs
is read with few kernel calls and without a gather. Nothing is ever moved, hence placement has to leave room
ahead:

- a growing sequence takes the blocks right after its last one while they are free;
- everything else goes into the largest free interval (worst fit), into its middle: whoever ends where the
  interval starts can go on growing into the first half, the newcomer into the second. Best fit would pack
  tightly and cut every run at the first growth. An interval that starts at block 0 has nobody to its left and
  is filled from 0.

A full block may be given the name of its content (placement.serving.prefix). Then it can be found, and shared, until it
is allocated anew: without references it is only cached, and the least recently used are evicted first.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from itertools import chain, pairwise
from operator import sub

# Eviction frees at least one in so many blocks of the pool, where as many are cached: freed one by one they would
# come in the order in which sequences ended, from their ends, and cut what grows into runs of one block.
_EVICTION_SHARE = 32


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for. Internal: the scheduler preempts or waits."""

    def __init__(self, *, wanted: int, free: int) -> None:
        self.wanted = wanted
        self.free = free
        super().__init__(f"{wanted} blocks wanted, {free} free")


class BlockPool:
    """The KV blocks of a replica, with reference counts and the names of their contents.

    A block is in use (it has references), cached (none, but a name) or free (neither).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1 and block_size >= 1, (num_blocks, block_size)
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._free = _FreeIntervals(num_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}  # the other way round

    @property
    def num_total(self) -> int:
        """Blocks there are."""
        return len(self._refs)

    @property
    def num_free(self) -> int:
        """Blocks that nobody refers to, those that are cached included: as many can be allocated."""
        return self._free.num_blocks + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to and that can still be found."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int, *, sharing: Seq[int] = ()) -> bool:
        """Whether ``allocate(count)`` would succeed, once ``sharing`` were shared."""
        taken = sum(1 for block in sharing if not self._refs[block])
        return count + taken <= self.num_free

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Takes ``count`` blocks, with one reference each, in the order in which they are to be filled.

        Free blocks are taken first. O(n log n) in the free intervals, of which there is at most one more than there
        are runs not free.

        Args:
            after: last block of the sequence that grows; absent for a new sequence.

        Raises:
            OutOfBlocks: fewer than ``count`` are free or cached; then none is taken.
        """
        assert count >= 0, count
        if count > self.num_free:
            raise OutOfBlocks(wanted=count, free=self.num_free)
        if count > self._free.num_blocks:
            self._evict(count - self._free.num_blocks)
        blocks = [] if after is None else list(self._free.take_behind(after, count))
        blocks += self._free.take(count - len(blocks))
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, blocks: Seq[int]) -> None:
        """Adds one reference to each; all must be in use or cached."""
        for block in blocks:
            if not self._refs[block]:
                assert block in self._cached, f"block {block} is free"
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Seq[int], *, retain: bool = True) -> None:
        """Drops one reference from each block of a table; one without references is cached or free again.

        The table's end counts as less recently used than its start: without a start no end can be found.

        Args:
            retain: cache those that have a name.
        """
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} is free already"
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if retain and block in self._names:
                self._cached[block] = None
            else:
                self._discard(block)

    def name(self, block: int, name: bytes) -> None:
        """Lets a block in use be found by ``name``: it is full and computed, and nobody writes to it any more.

        A name has one block: the first, while that is in use. A cached one gives its name up and is free again, so
        that the name is as recently used as what follows it in the new block's table.
        """
        assert self._refs[block] > 0 and block not in self._names, f"block {block} is free or has a name"
        other = self._named.get(name)
        if other is not None and self._refs[other]:
            return
        if other is not None:
            del self._cached[other]
            self._discard(other)
        self._named[name] = block
        self._names[block] = name

    def find(self, name: bytes) -> int | None:
        """The block of that name, in use or cached."""
        return self._named.get(name)

    def check(self, tables: Iterable[Seq[int]] | None = None) -> None:
        """Asserts what must always hold; given the block tables of all who refer to blocks, also the counts."""
        self._free.check(self.num_total)
        free = set(self._free)
        assert all(refs >= 0 for refs in self._refs)
        assert not free & self._cached.keys()
        assert free | self._cached.keys() == {block for block, refs in enumerate(self._refs) if refs == 0}
        assert self._cached.keys() <= self._names.keys() and not free & self._names.keys()
        assert self._named == {name: block for block, name in self._names.items()}
        if tables is not None:
            held = Counter(chain.from_iterable(tables))
            assert self._refs == [held[block] for block in range(self.num_total)]

    def _evict(self, count: int) -> None:
        """Frees at least ``count`` cached blocks."""
        for _ in range(min(max(count, self.num_total // _EVICTION_SHARE), len(self._cached))):
            block, _ = self._cached.popitem(last=False)
            self._discard(block)

    def _discard(self, block: int) -> None:
        name = self._names.pop(block, None)
        if name is not None:
            del self._named[name]
        self._free.give_back(block)


class _FreeIntervals:
    """The free blocks: ``[_starts[i], _stops[i])`` are sorted, disjoint and never touch."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._starts = [0]
        self._stops = [num_blocks]

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

    def _cut_largest(self, lengths: Seq[int], count: int) -> range:
        """Takes ``count`` blocks out of the middle of the largest interval, which has as many."""
        index = lengths.index(max(lengths))
        start = self._starts[index]
        return self._cut(index, start if start == 0 else start + (lengths[index] - count) // 2, count)

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

    def check(self, num_total: int) -> None:
        """Asserts what must always hold."""
        assert len(self._starts) == len(self._stops)
        intervals = list(zip(self._starts, self._stops, strict=True))
        assert all(0 <= start < stop <= num_total for start, stop in intervals), intervals
        assert all(left[1] < right[0] for left, right in pairwise(intervals)), intervals
        assert self.num_blocks == sum(stop - start for start, stop in intervals)

    def _cut(self, index: int, first: int, count: int) -> range:
        """Takes ``[first, first + count)``, or what interval ``index`` has of it."""
        start, stop = self._starts[index], self._stops[index]
        last = min(first + count, stop)
        rest = [(a, b) for a, b in ((start, first), (last, stop)) if a < b]
        self._starts[index : index + 1] = [a for a, _ in rest]
        self._stops[index : index + 1] = [b for _, b in rest]
        self.num_blocks -= last - first
        return range(first, last)


class TableRuns:
    """The runs of one sequence's block table, kept as it grows: a step then looks at what is new alone."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._table: Seq[int] = ()
        self._num_blocks = 0
        self._runs: list[tuple[int, int]] = []

    def first(self, block_table: list[int], num_tokens: int) -> tuple[tuple[int, int], ...]:
        """As :func:`block_runs`. A table only ever grows; a new one is another list."""
        if block_table is not self._table:
            self._table, self._num_blocks, self._runs = block_table, 0, []
        for block in block_table[self._num_blocks :]:
            start, stop = block * self._block_size, (block + 1) * self._block_size
            if self._runs and self._runs[-1][1] == start:
                self._runs[-1] = (self._runs[-1][0], stop)
            else:
                self._runs.append((start, stop))
        self._num_blocks = len(block_table)
        return _without_last(self._runs, self._num_blocks * self._block_size - num_tokens)


def _without_last(runs: Seq[tuple[int, int]], count: int) -> tuple[tuple[int, int], ...]:
    """``runs`` without their last ``count`` slots."""
    assert count >= 0, count
    kept = len(runs)
    while count and runs[kept - 1][1] - runs[kept - 1][0] <= count:
        kept -= 1
        count -= runs[kept][1] - runs[kept][0]
    if not count:
        return tuple(runs[:kept])
    start, stop = runs[kept - 1]
    return (*runs[: kept - 1], (start, stop - count))


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
