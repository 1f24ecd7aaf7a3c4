from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from placement.serving.kv.blocks import BlockPool, OutOfBlocks
from placement.serving.kv.runs import TableRuns, block_runs


def test_first_allocation_in_an_empty_pool_starts_at_block_0() -> None:
    assert BlockPool(16, 4).allocate(3) == [0, 1, 2]


def test_new_sequence_starts_in_the_middle_of_the_largest_free_interval() -> None:
    pool = BlockPool(16, 4)
    pool.allocate(4)
    assert pool.allocate(2) == [9, 10]  # [4, 16) leaves 5 before, 5 after


def test_growing_sequence_takes_the_blocks_after_its_last() -> None:
    pool = BlockPool(16, 4)
    table = pool.allocate(2)
    pool.allocate(2)
    assert pool.allocate(3, after=table[-1]) == [2, 3, 4]


def test_growing_sequence_moves_on_to_the_largest_interval_when_its_neighbour_is_taken() -> None:
    pool = BlockPool(9, 4)
    first = pool.allocate(4)  # 0..3
    pool.allocate(1, after=3)  # 4
    assert pool.allocate(1, after=first[-1]) == [6]


def test_growth_takes_what_is_adjacent_before_it_jumps() -> None:
    pool = BlockPool(10, 4)
    pool.allocate(10)
    pool.release([3, 4, 7, 8, 9])
    assert pool.allocate(4, after=2) == [3, 4, 7, 8]


def test_request_larger_than_any_interval_is_made_of_the_longest_runs() -> None:
    pool = BlockPool(10, 4)
    pool.allocate(10)
    pool.release([1, 4, 5, 6, 8, 9])
    assert pool.allocate(5) == [4, 5, 6, 8, 9]
    assert pool.num_free == 1


def test_allocate_takes_nothing_when_there_is_not_enough() -> None:
    pool = BlockPool(4, 4)
    pool.allocate(3)
    assert not pool.can_allocate(2)
    with pytest.raises(OutOfBlocks) as caught:
        pool.allocate(2)
    assert (caught.value.wanted, caught.value.free) == (2, 1)
    assert pool.num_free == 1
    pool.check()


def test_shared_block_is_free_only_when_both_owners_let_go() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 2
    pool.release(blocks)
    assert pool.num_free == 4


def test_releasing_or_sharing_a_free_block_is_an_error() -> None:
    pool = BlockPool(4, 4)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.release([block])
    with pytest.raises(AssertionError):
        pool.share([block])


def named(pool: BlockPool, names: bytes) -> list[int]:
    """A table whose blocks have the names given, a byte each."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.name(block, bytes([name]))
    return blocks


def test_named_blocks_can_be_found_after_their_last_reference_and_still_count_as_free() -> None:
    pool = BlockPool(8, 4)
    blocks = named(pool, b"ab")
    pool.release([*blocks, *pool.allocate(1)])
    assert [pool.find(b"a"), pool.find(b"b"), pool.find(b"c")] == [*blocks, None]
    assert (pool.num_free, pool.num_cached) == (8, 2)
    pool.share(blocks)
    assert (pool.num_free, pool.num_cached) == (6, 0)
    assert not set(pool.allocate(6)) & set(blocks)


def test_without_retention_named_blocks_are_found_while_in_use_only() -> None:
    pool = BlockPool(8, 4)
    blocks = named(pool, b"ab")
    pool.share(blocks)
    pool.release(blocks, retain=False)
    assert pool.find(b"b") == blocks[1]
    pool.release(blocks, retain=False)
    assert pool.find(b"a") is None and (pool.num_free, pool.num_cached) == (8, 0)


def test_free_blocks_are_taken_before_any_is_evicted() -> None:
    pool = BlockPool(8, 4)
    pool.release(named(pool, b"abc"))
    pool.allocate(5)
    assert pool.num_cached == 3
    pool.allocate(1)
    assert pool.num_cached == 2


def test_the_least_recently_used_table_is_evicted_first_from_its_end() -> None:
    pool = BlockPool(6, 4)
    first, second = named(pool, b"abc"), named(pool, b"xyz")
    pool.release(first)
    pool.release(second)
    pool.share(first[:1])  # used again
    pool.release(first[:1])
    evicted = []
    for _ in range(6):
        pool.allocate(1)
        evicted.append({name for name in b"abcxyz" if pool.find(bytes([name])) is None})
    order = [min(later - earlier) for earlier, later in pairwise([set(), *evicted])]
    assert bytes(order) == b"cbzyxa"


def test_eviction_in_a_large_pool_frees_several_blocks_at_once_so_that_growth_finds_neighbours() -> None:
    pool = BlockPool(128, 4)
    pool.release(named(pool, bytes(range(128))))
    table = pool.allocate(1)
    assert pool.num_cached == 124
    assert pool.allocate(1, after=table[-1]) == [table[-1] + 1]


def test_a_name_stays_with_its_first_block_while_that_is_in_use() -> None:
    pool = BlockPool(4, 4)
    (first,), (second,) = named(pool, b"a"), named(pool, b"a")
    assert pool.find(b"a") == first
    pool.release([second])
    assert pool.num_cached == 0


def test_a_name_moves_from_a_cached_block_to_the_one_in_use() -> None:
    pool = BlockPool(4, 4)
    pool.release(named(pool, b"a"))
    (second,) = named(pool, b"a")
    assert pool.find(b"a") == second and pool.num_cached == 0 and pool.num_free == 3


def test_room_for_an_allocation_does_not_count_the_cached_blocks_that_are_to_be_shared() -> None:
    pool = BlockPool(4, 4)
    blocks = named(pool, b"ab")
    pool.release(blocks)
    assert pool.can_allocate(4) and pool.can_allocate(2, sharing=blocks)
    assert not pool.can_allocate(3, sharing=blocks)
    pool.share(blocks)
    assert pool.can_allocate(2, sharing=blocks)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_rounds_up(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(4, 4).blocks_for(num_tokens) == num_blocks


def test_sequences_that_grow_together_keep_long_runs() -> None:
    """Round-robin growth is the worst case for a packed pool: there every block would be a run of its own."""
    pool = BlockPool(256, 16)
    tables = [pool.allocate(2) for _ in range(8)]
    for _ in range(14):
        for table in tables:
            table += pool.allocate(1, after=table[-1])
    runs = sum(len(block_runs(table, 16, len(table) * 16)) for table in tables)
    assert runs <= 2 * len(tables)


def test_block_runs_merge_adjacent_blocks_and_stop_at_the_last_token() -> None:
    assert block_runs([3, 4, 5, 9, 10, 2], 4, 21) == ((12, 24), (36, 44), (8, 9))
    assert block_runs([3, 4], 4, 0) == ()
    assert block_runs([3, 4, 5], 4, 4) == ((12, 16),)  # blocks kept in reserve are not read


def test_block_runs_refuse_tokens_that_have_no_slot() -> None:
    with pytest.raises(AssertionError):
        block_runs([0], 4, 5)


@given(st.data(), st.integers(1, 5))
def test_block_runs_list_the_slots_in_token_order(data: st.DataObject, block_size: int) -> None:
    table = data.draw(st.lists(st.integers(0, 12), unique=True))
    num_tokens = data.draw(st.integers(0, len(table) * block_size))
    slots = [table[token // block_size] * block_size + token % block_size for token in range(num_tokens)]
    runs = block_runs(table, block_size, num_tokens)
    assert [slot for start, stop in runs for slot in range(start, stop)] == slots
    assert all(left[1] != right[0] for left, right in pairwise(runs))


class PoolMachine(RuleBasedStateMachine):
    """Random owners against plain lists: reference counts, and the cached blocks by age."""

    @initialize(num_blocks=st.integers(1, 20))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.refs = [0] * num_blocks
        self.names: dict[int, bytes] = {}
        self.cached: list[int] = []
        self.owned: list[list[int]] = []

    @rule(count=st.integers(0, 8), grow=st.booleans(), data=st.data())
    def allocate(self, count: int, grow: bool, data: st.DataObject) -> None:
        growing = data.draw(st.sampled_from([t for t in self.owned if t])) if grow and any(self.owned) else None
        after = growing[-1] if growing else None
        if count > self.refs.count(0):
            assert not self.pool.can_allocate(count)
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count, after=after)
            return
        assert self.pool.can_allocate(count)
        num_evicted = max(0, count - (self.refs.count(0) - len(self.cached)))
        free = {block for block, refs in enumerate(self.refs) if not refs} - set(self.cached[num_evicted:])
        blocks = self.pool.allocate(count, after=after)
        assert len(set(blocks)) == count and free >= set(blocks)
        if blocks and after is not None and after + 1 in free:
            assert blocks[0] == after + 1
        for block in self.cached[:num_evicted]:
            del self.names[block]
        del self.cached[:num_evicted]
        for block in blocks:
            self.refs[block] += 1
        self.owned.append(blocks)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        held = [block for block, refs in enumerate(self.refs) if refs or block in self.cached]
        if held:
            blocks = data.draw(st.lists(st.sampled_from(held), unique=True))
            assert self.pool.can_allocate(0, sharing=blocks)
            self.pool.share(blocks)
            for block in blocks:
                self.refs[block] += 1
            self.cached = [block for block in self.cached if block not in blocks]
            self.owned.append(list(blocks))

    @rule(data=st.data(), name=st.integers(0, 15).map(lambda number: bytes([number])))
    def name(self, data: st.DataObject, name: bytes) -> None:
        nameless = [block for block, refs in enumerate(self.refs) if refs and block not in self.names]
        if not nameless:
            return
        block = data.draw(st.sampled_from(nameless))
        self.pool.name(block, name)
        other = next((other for other, taken in self.names.items() if taken == name), None)
        if other is None or other in self.cached:
            if other is not None:
                self.cached.remove(other)
                del self.names[other]
            self.names[block] = name

    @rule(data=st.data(), retain=st.booleans())
    def release(self, data: st.DataObject, retain: bool) -> None:
        if not self.owned:
            return
        blocks = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pool.release(blocks, retain=retain)
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block]:
                continue
            if retain and block in self.names:
                self.cached.append(block)
            else:
                self.names.pop(block, None)

    @invariant()
    def agrees_with_the_model(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.owned)
            assert self.pool.num_free == self.refs.count(0)
            assert self.pool.num_cached == len(self.cached)
            assert self.pool.num_total == len(self.refs)
            found = {number: self.pool.find(bytes([number])) for number in range(16)}
            assert {block: bytes([number]) for number, block in found.items() if block is not None} == self.names


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60, unique=True), st.data())
def test_runs_kept_as_a_table_grows_are_those_of_the_table(blocks: list[int], data: st.DataObject) -> None:
    runs, table = TableRuns(4), []
    for block in blocks:
        table.append(block)
        num_tokens = data.draw(st.integers(0, 4 * len(table)))
        assert runs.first(table, num_tokens) == block_runs(table, 4, num_tokens)
    other = blocks[::-1]
    assert runs.first(other, 4 * len(other)) == block_runs(other, 4, 4 * len(other)), "a new table is looked at anew"


def test_a_long_allocation_from_a_pool_in_pieces_takes_the_largest_first() -> None:
    pool = BlockPool(40_000, 16)
    held = pool.allocate(40_000)
    pool.release(held[::2])
    pool.release(held[101:111:2])
    taken = pool.allocate(5_000)
    assert taken[:11] == list(range(100, 111)), "the one long interval"
    assert len(set(taken)) == 5_000
    pool.check()
