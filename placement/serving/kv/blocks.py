"""Allocates KV blocks, counts who refers to each, and finds blocks by their content.

A full block may be given the name of its content (placement.serving.prefix). Then it can be found, and shared, until it
is allocated anew: without references it is only cached, and the least recently used blocks are evicted first.
placement.serving.kv.regions decides in which region new blocks are taken, placement.serving.kv.intervals where there.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import chain

from placement.planning.residency import Residency, everything_local
from placement.serving.kv.regions import Regions
from placement.serving.offload.orders import Names


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

    def __init__(self, num_blocks: int, block_size: int, residency: Residency | None = None) -> None:
        """``residency`` says who holds which of the blocks; None: the replica's own ranks hold all."""
        assert num_blocks >= 1 and block_size >= 1, (num_blocks, block_size)
        residency = residency or everything_local(num_blocks)
        assert residency.num_blocks == num_blocks, (residency, num_blocks)
        self.block_size = block_size
        self._refs = [0] * num_blocks
        self._regions = Regions(residency)
        self._num_local = residency.num_local_blocks
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}  # the other way round
        self._changed: dict[int, None] = {}  # blocks that attention workers hold, whose names are news to them
        self._adopted: set[int] = set()

    @property
    def num_total(self) -> int:
        """Counts all blocks."""
        return len(self._refs)

    @property
    def num_free(self) -> int:
        """Counts the blocks that nobody refers to, cached ones included: as many can be allocated."""
        return self._regions.num_free

    @property
    def num_cached(self) -> int:
        """Counts the blocks that nobody refers to and that can still be found."""
        return self._regions.num_cached

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
        blocks: list[int] = []
        for region, taken in self._regions.deal(count, after=after):
            for _ in range(region.to_evict(taken)):
                self._discard(region.cached.popitem(last=False)[0])
            if after is not None:
                behind = region.free.take_behind(after, taken)
                taken -= len(behind)
                blocks += behind
            blocks += region.free.take(taken)
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, blocks: Seq[int]) -> None:
        """Adds one reference to each of ``blocks``, which must be in use or cached."""
        for block in blocks:
            if not self._refs[block]:
                cached = self._regions.of(block).cached
                assert block in cached, f"block {block} is free"
                del cached[block]
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
                self._regions.of(block).cached[block] = None
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
            del self._regions.of(other).cached[other]
            self._discard(other)
        self._set_name(block, name)

    def find(self, name: bytes) -> int | None:
        """Returns the block of that name, in use or cached, or None where there is none."""
        return self._named.get(name)

    def forget_names(self) -> None:
        """Takes all names away: what was in the blocks is lost. Cached blocks are free again."""
        for block in list(self._names):
            self._drop_name(block)
        for region in self._regions.all:
            for block in region.cached:
                region.free.give_back(block)
            region.cached.clear()

    def adopt(self, names: Names, *, stale: Iterable[int] = ()) -> int:
        """Caches blocks whose contents attention workers still have from before. Call it while all blocks are free.

        A name that cannot be is dropped: of a block that is not there, that no attention worker holds, or that
        another block has already.

        Args:
            names: the hash of the text of each block. Those that come first are evicted first.
            stale: blocks of which some attention worker has a name that does not count; it is to forget that.

        Returns:
            the number of blocks that can be found now.
        """
        self._changed |= {block: None for block in stale if self._num_local <= block < self.num_total}
        for block, name in names.items():
            if not self._num_local <= block < self.num_total:
                continue
            if name in self._named:
                self._changed[block] = None
                continue
            region = self._regions.of(block)
            region.free.take_one(block)
            region.cached[block] = None
            self._named[name] = block
            self._names[block] = name
            self._adopted.add(block)
        return len(self._adopted)

    def is_adopted(self, block: int) -> bool:
        """Tells whether a block has its name from :meth:`adopt`: an incarnation of the replica before computed it."""
        return block in self._adopted

    def take_changes(self) -> tuple[tuple[tuple[int, bytes], ...], tuple[int, ...]]:
        """Returns what attention workers have to learn of the names of their blocks since the last call.

        Returns:
            the blocks that have been given names, with these, and the blocks that have lost theirs.
        """
        if not self._changed:
            return (), ()
        changed, self._changed = self._changed, {}
        names = tuple((block, self._names[block]) for block in changed if block in self._names)
        return names, tuple(block for block in changed if block not in self._names)

    def check(self, tables: Iterable[Seq[int]] | None = None) -> None:
        """Asserts what must always hold; with the block tables of all who refer to blocks, also the counts."""
        free: set[int] = set()
        cached: set[int] = set()
        for region in self._regions.all:
            region.free.check(region.size)
            free |= set(region.free)
            cached |= region.cached.keys()
            assert all(self._regions.of(block) is region for block in chain(region.free, region.cached))
        assert all(refs >= 0 for refs in self._refs)
        assert not free & cached
        assert free | cached == {block for block, refs in enumerate(self._refs) if refs == 0}
        assert cached <= self._names.keys() and not free & self._names.keys()
        assert self._named == {name: block for block, name in self._names.items()}
        assert self._adopted <= self._names.keys()
        if tables is not None:
            held = Counter(chain.from_iterable(tables))
            assert self._refs == [held[block] for block in range(self.num_total)]

    def _discard(self, block: int) -> None:
        if block in self._names:
            self._drop_name(block)
        self._regions.of(block).free.give_back(block)

    def _set_name(self, block: int, name: bytes) -> None:
        self._named[name] = block
        self._names[block] = name
        if block >= self._num_local:
            self._changed[block] = None

    def _drop_name(self, block: int) -> None:
        del self._named[self._names.pop(block)]
        self._adopted.discard(block)
        if block >= self._num_local:
            self._changed[block] = None
