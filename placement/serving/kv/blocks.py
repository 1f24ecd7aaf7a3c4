"""Allocates KV blocks, counts who refers to each, and finds blocks by their content.

A full block may be given the name of its content (placement.serving.prefix). Then it can be found, and shared, until it
is allocated anew: without references it is only cached, and the least recently used blocks are evicted first.
placement.serving.kv.intervals decides where new blocks are taken from.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import chain

from placement.serving.kv.intervals import FreeIntervals

# Eviction frees at least one in so many blocks of the pool, where as many are cached: freed one by one they would
# come in the order in which sequences ended, from their ends, and cut what grows into runs of one block.
_EVICTION_SHARE = 32


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for. No user sees this error: the scheduler preempts or waits."""

    def __init__(self, *, wanted: int, free: int) -> None:
        self.wanted = wanted
        self.free = free
        super().__init__(f"{wanted} blocks wanted, {free} free")


class BlockPool:
    """Keeps the KV blocks of a replica, with reference counts and the names of their contents.

    A block is in use (it has references), cached (it has a name alone) or free (it has neither).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1 and block_size >= 1, (num_blocks, block_size)
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._free = FreeIntervals(num_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}  # the other way round

    @property
    def num_total(self) -> int:
        """Counts all blocks."""
        return len(self._refs)

    @property
    def num_free(self) -> int:
        """Counts the blocks that nobody refers to, cached ones included: as many can be allocated."""
        return self._free.num_blocks + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Counts the blocks that nobody refers to and that can still be found."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Returns how many blocks ``num_tokens`` tokens need."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int, *, sharing: Seq[int] = ()) -> bool:
        """Tells whether ``allocate(count)`` would succeed after ``share(sharing)``."""
        taken = sum(1 for block in sharing if not self._refs[block])
        return count + taken <= self.num_free

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Takes ``count`` blocks, with one reference each, in the order in which they are to be filled.

        Free blocks are taken before cached ones. The time is O(n log n) in the free intervals, of which there is at
        most one more than there are runs that are not free.

        Args:
            after: the last block of the sequence that grows; None for a new sequence.

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
        """Adds one reference to each of ``blocks``, which must be in use or cached."""
        for block in blocks:
            if not self._refs[block]:
                assert block in self._cached, f"block {block} is free"
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Seq[int], *, retain: bool = True) -> None:
        """Drops one reference from each block of a table. A block without references is cached, or free again.

        The end of the table counts as less recently used than its start: without the start no end can be found.

        Args:
            retain: whether blocks that have a name are cached.
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
        """Makes a block in use findable by ``name``. It is full and computed, and nobody writes to it any more.

        A name has one block: the first one, while that is in use. A cached block gives its name up and is free again,
        so that the name is as recently used as the blocks that follow it in the new block's table.
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
        """Returns the block of that name, in use or cached, or None where there is none."""
        return self._named.get(name)

    def check(self, tables: Iterable[Seq[int]] | None = None) -> None:
        """Asserts what must always hold; with the block tables of all who refer to blocks, also the counts."""
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
