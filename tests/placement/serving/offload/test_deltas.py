"""Deltas make the next tables of the last ones, and are few."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.serving.offload.deltas import (
    Appended,
    BadDelta,
    Begun,
    Cut,
    Delta,
    Freed,
    Moved,
    apply,
    copies,
    deltas,
)

NUM_BLOCKS = 100
TABLES = st.dictionaries(st.integers(0, 6), st.lists(st.integers(0, NUM_BLOCKS - 1), max_size=6).map(tuple), max_size=5)
Tables = dict[int, tuple[int, ...]]


@st.composite
def next_tables(draw: st.DrawFn, tables: Tables, new_id: int) -> Tables:
    """Tables after a step: sequences grow, fork, begin, end, are cut and moved."""
    after = dict(tables)
    blocks = st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=3).map(tuple)
    for sequence in tables:
        table = after[sequence]
        match draw(st.sampled_from(["keep", "grow", "fork", "end", "cut", "move"])):
            case "grow":
                after[sequence] = (*table, *draw(blocks))
            case "fork":
                after[new_id] = (*table[: draw(st.integers(0, len(table)))], *draw(blocks))
                new_id += 1
            case "end":
                del after[sequence]
            case "cut":
                after[sequence] = table[: draw(st.integers(0, len(table)))]
            case "move":
                after[sequence] = tuple(draw(st.sampled_from([block, NUM_BLOCKS - 1 - block])) for block in table)
    if draw(st.booleans()):
        after[new_id] = draw(blocks)
    return after


@given(st.data())
def test_replayed_deltas_give_the_tables(data: st.DataObject) -> None:
    leader: Tables = {}
    worker: Tables = {}
    for step in range(data.draw(st.integers(1, 8))):
        after = data.draw(next_tables(leader, 100 * (step + 1)))
        worker = apply(worker, deltas(leader, after), num_blocks=NUM_BLOCKS)
        leader = after
        assert worker == leader


@given(before=TABLES, after=TABLES)
def test_any_tables_follow_from_any_others(before: Tables, after: Tables) -> None:
    assert apply(before, deltas(before, after), num_blocks=NUM_BLOCKS) == after


@given(tables=TABLES)
def test_nothing_is_told_where_nothing_changed(tables: Tables) -> None:
    assert deltas(tables, dict(tables)) == ()


def test_growth_is_told_by_the_new_blocks_alone() -> None:
    assert deltas({1: (4, 5)}, {1: (4, 5, 9)}) == (Appended(sequence=1, blocks=(9,)),)


def test_a_fork_shares_the_blocks_of_its_parent_even_as_that_ends() -> None:
    told = deltas({1: (4, 5, 6)}, {2: (4, 5, 9)})
    assert told == (Begun(sequence=2, parent=1, num_shared=2, blocks=(9,)), Freed(sequence=1))


def test_sequences_that_begin_together_share_with_each_other() -> None:
    told = deltas({}, {1: (4, 5, 6), 2: (4, 5, 7)})
    assert told == (Begun(sequence=1, blocks=(4, 5, 6)), Begun(sequence=2, parent=1, num_shared=2, blocks=(7,)))


def test_a_sequence_shares_with_whoever_has_most_in_common() -> None:
    told = deltas({1: (4, 5), 2: (4, 5, 6), 3: (8,)}, {1: (4, 5), 2: (4, 5, 6), 3: (8,), 4: (4, 5, 6, 7)})
    assert told == (Begun(sequence=4, parent=2, num_shared=3, blocks=(7,)),)


def test_a_sequence_that_is_cut_and_one_that_moves() -> None:
    told = deltas({1: (4, 5, 6), 2: (7, 8)}, {1: (4, 5), 2: (7, 9)})
    assert told == (Cut(sequence=1, num_blocks=2), Moved(sequence=2, blocks=((1, 9),)))


def test_moved_blocks_are_copied_once_for_all_who_share_them() -> None:
    before = {1: (4, 5), 2: (4, 6)}
    told = deltas(before, {1: (8, 5), 2: (8, 4)})
    assert copies(before, told) == ((4, 8), (6, 4))


@pytest.mark.parametrize(
    "delta",
    [
        Begun(sequence=1, blocks=()),
        Begun(sequence=2, parent=3, num_shared=1, blocks=()),
        Begun(sequence=2, parent=1, num_shared=3, blocks=()),
        Begun(sequence=2, parent=1, num_shared=-1, blocks=()),
        Begun(sequence=2, num_shared=1, blocks=()),
        Begun(sequence=2, blocks=(NUM_BLOCKS,)),
        Appended(sequence=3, blocks=(1,)),
        Appended(sequence=1, blocks=(-1,)),
        Cut(sequence=1, num_blocks=3),
        Cut(sequence=1, num_blocks=-1),
        Moved(sequence=1, blocks=((2, 5),)),
        Moved(sequence=1, blocks=((-1, 5),)),
        Moved(sequence=1, blocks=((0, NUM_BLOCKS),)),
        Freed(sequence=3),
    ],
    ids=str,
)
def test_a_delta_that_does_not_fit_is_refused(delta: Delta) -> None:
    tables = {1: (4, 5)}
    with pytest.raises(BadDelta, match="sequence"):
        apply(tables, [delta], num_blocks=NUM_BLOCKS)
    assert tables == {1: (4, 5)}


def test_copies_of_places_that_there_are_not_are_refused() -> None:
    calls: list[Callable[[], object]] = [
        lambda: copies({1: (4,)}, [Moved(sequence=1, blocks=((1, 5),))]),
        lambda: copies({1: (4,)}, [Moved(sequence=2, blocks=((0, 5),))]),
    ]
    for call in calls:
        with pytest.raises(BadDelta):
            call()
