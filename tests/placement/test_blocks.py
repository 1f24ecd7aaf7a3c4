from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from placement.blocks import BlockPool, OutOfBlocks, block_runs


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
    """Random owners against a plain list of reference counts."""

    @initialize(num_blocks=st.integers(1, 20))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.refs = [0] * num_blocks
        self.owned: list[list[int]] = []

    @rule(count=st.integers(0, 8), grow=st.booleans(), data=st.data())
    def allocate(self, count: int, grow: bool, data: st.DataObject) -> None:
        growing = data.draw(st.sampled_from([t for t in self.owned if t])) if grow and any(self.owned) else None
        after = growing[-1] if growing else None
        if count > self.refs.count(0):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count, after=after)
            return
        next_is_free = after is not None and after + 1 < len(self.refs) and self.refs[after + 1] == 0
        blocks = self.pool.allocate(count, after=after)
        assert len(set(blocks)) == count and all(self.refs[block] == 0 for block in blocks)
        if blocks and next_is_free and after is not None:
            assert blocks[0] == after + 1
        for block in blocks:
            self.refs[block] += 1
        self.owned.append(blocks)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.owned:
            blocks = data.draw(st.sampled_from(self.owned))
            self.pool.share(blocks)
            for block in blocks:
                self.refs[block] += 1
            self.owned.append(list(blocks))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.owned:
            blocks = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
            self.pool.release(blocks)
            for block in blocks:
                self.refs[block] -= 1

    @invariant()
    def agrees_with_the_reference_counts(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.pool.num_free == self.refs.count(0)
            assert self.pool.num_total == len(self.refs)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
