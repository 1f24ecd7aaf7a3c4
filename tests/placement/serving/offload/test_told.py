"""What attention workers are told of block tables makes them know the tables that steps use."""

from hypothesis import given
from hypothesis import strategies as st

from placement.serving.offload.deltas import Appended, Begun, Freed, Moved, apply
from placement.serving.offload.told import ToldTables

Steps = list[dict[int, tuple[int, ...]]]


@given(
    st.lists(
        st.dictionaries(st.integers(0, 9), st.lists(st.integers(0, 63), max_size=5).map(tuple), max_size=4), max_size=20
    ),
    st.integers(1, 5),
)
def test_whoever_applies_what_is_told_knows_the_tables_of_each_step(steps: Steps, most: int) -> None:
    told, known = ToldTables(most), dict[int, tuple[int, ...]]()
    for tables in steps:
        deltas = told.update(tables)
        assert not any(isinstance(delta, Moved) for delta in deltas)
        known = apply(known, deltas, num_blocks=64)
        assert tables.items() <= known.items()
        assert len(known) <= max(most, len(tables))


def test_nothing_is_told_of_a_table_that_stays_and_only_what_is_new_of_one_that_grows() -> None:
    told = ToldTables()
    assert told.update({1: (4, 5)}) == (Begun(sequence=1, blocks=(4, 5)),)
    assert told.update({1: (4, 5)}) == ()
    assert told.update({1: (4, 5, 9)}) == (Appended(sequence=1, blocks=(9,)),)


def test_a_sequence_that_lost_its_blocks_begins_anew() -> None:
    told = ToldTables()
    told.update({1: (4, 5)})
    assert told.update({1: (4, 6, 7)}) == (Freed(sequence=1), Begun(sequence=1, blocks=(4, 6, 7)))


def test_the_sequences_that_were_not_used_for_longest_are_forgotten_first() -> None:
    told = ToldTables(2)
    told.update({1: (1,), 2: (2,)})
    told.update({1: (1,)})
    assert told.update({3: (3,)}) == (Begun(sequence=3, blocks=(3,)), Freed(sequence=2))
