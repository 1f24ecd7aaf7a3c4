import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.serving.sharing import SharedPrefix, shared_prefixes


def shared(*members: int, first: int = 0, blocks: int) -> SharedPrefix:
    return SharedPrefix(members=members, first_block=first, num_blocks=blocks)


def test_nothing_in_common_makes_no_group() -> None:
    assert shared_prefixes([[1, 2], [3, 4], [2, 1]], [9, 9, 9], 4) == ()
    assert shared_prefixes([], [], 4) == ()


def test_one_trunk_of_all() -> None:
    tables = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 10]]
    assert shared_prefixes(tables, [14, 13, 16], 4) == (shared(0, 1, 2, blocks=3),)


def test_branches_under_a_trunk() -> None:
    tables = [[1, 2, 10, 11, 20], [1, 2, 30, 31], [1, 2, 10, 11, 21], [1, 2, 30, 32], [1, 2, 40]]
    assert shared_prefixes(tables, [17, 13, 17, 13, 9], 4) == (
        shared(0, 1, 2, 3, 4, blocks=2),
        shared(0, 2, first=2, blocks=2),
        shared(1, 3, first=2, blocks=1),
    )


def test_groups_beside_each_other_and_one_alone() -> None:
    tables = [[1, 8], [2, 9], [1, 10], [2, 11], [3, 12]]
    assert shared_prefixes(tables, [5] * 5, 4) == (shared(0, 2, blocks=1), shared(1, 3, blocks=1))


@pytest.mark.parametrize(("num_tokens", "blocks"), [(13, 3), (12, 2), (9, 2)])
def test_the_block_of_the_newest_token_is_not_shared(num_tokens: int, blocks: int) -> None:
    tables = [[1, 2, 3, 4], [1, 2, 3, 4]]
    assert shared_prefixes(tables, [13, num_tokens], 4) == (shared(0, 1, blocks=blocks),)


def test_short_sequences_share_nothing() -> None:
    assert shared_prefixes([[1], [1]], [4, 4], 4) == ()


def test_blocks_in_reserve_are_not_shared() -> None:
    assert shared_prefixes([[1, 2, 3], [1, 2, 3]], [5, 5], 4) == (shared(0, 1, blocks=1),)


def test_members_of_a_run_that_end_early_leave_the_rest_to_the_others() -> None:
    tables = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6]]
    assert shared_prefixes(tables, [13, 6, 13], 4) == (shared(0, 1, 2, blocks=1), shared(0, 2, first=1, blocks=2))


def test_small_groups_are_left_out() -> None:
    tables = [[1, 2, 7], [1, 2, 8], [1, 3, 9]]
    assert shared_prefixes(tables, [9] * 3, 4, min_members=3) == (shared(0, 1, 2, blocks=1),)


def test_an_equal_block_after_a_difference_is_not_shared() -> None:
    assert shared_prefixes([[1, 5, 9], [2, 5, 9]], [12, 12], 4) == ()


def by_trie(tables: list[list[int]], limits: list[int], min_members: int) -> set[tuple[tuple[int, ...], int, int]]:
    """Every leading run with all its members, by brute force; runs of the same members are joined."""
    members_of: dict[tuple[int, ...], list[int]] = {}
    for member, (table, limit) in enumerate(zip(tables, limits, strict=True)):
        for stop in range(1, limit + 1):
            members_of.setdefault(tuple(table[:stop]), []).append(member)
    ends: dict[tuple[int, ...], list[int]] = {}
    for run, members in members_of.items():
        if len(members) >= min_members:
            ends.setdefault(tuple(members), []).append(len(run))
    return {(members, min(stops) - 1, len(stops)) for members, stops in ends.items()}


@settings(max_examples=400, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(2, 4))
def test_groups_are_those_of_the_tree_of_tables(data: st.DataObject, block_size: int, min_members: int) -> None:
    trunks = [[], *data.draw(st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=3))]
    tables = []
    for _ in range(data.draw(st.integers(0, 8))):
        trunk = data.draw(st.sampled_from(trunks))
        kept = trunk[: data.draw(st.integers(0, len(trunk)))]
        tables.append([*kept, *data.draw(st.lists(st.integers(0, 5), min_size=0 if kept else 1, max_size=6))])
    num_tokens = [data.draw(st.integers(1, len(table) * block_size)) for table in tables]
    limits = [(count - 1) // block_size for count in num_tokens]
    prefixes = shared_prefixes(tables, num_tokens, block_size, min_members=min_members)
    found = [(prefix.members, prefix.first_block, prefix.num_blocks) for prefix in prefixes]
    assert set(found) == by_trie(tables, limits, min_members) and len(set(found)) == len(found)
    for index, prefix in enumerate(prefixes):
        parents = [other for other in prefixes[:index] if set(other.members) > set(prefix.members)]
        assert sum(parent.num_blocks for parent in parents) == prefix.first_block, "a parent comes before its children"
