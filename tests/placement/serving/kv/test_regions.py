"""In which region blocks are allocated."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.planning.residency import Partition, Residency, everything_local, resident
from placement.serving.kv.blocks import BlockPool, OutOfBlocks


def requests(local: int, *remote: int) -> Residency:
    """Some local blocks, and regions of attention workers that divide requests."""
    return resident(
        Partition.REQUESTS,
        [1] * len(remote),
        num_kv_heads=2,
        block_size=4,
        num_local_blocks=local,
        num_remote_blocks=remote,
    )


def pool(local: int, *remote: int) -> BlockPool:
    return BlockPool(local + sum(remote), 4, requests(local, *remote))


def test_new_sequences_go_to_local_blocks_while_there_is_room() -> None:
    blocks = pool(4, 8)
    assert blocks.allocate(3) == [0, 1, 2]
    assert blocks.allocate(3) == [3, 4, 5], "what finds no room overflows"
    assert blocks.allocate(2)[0] >= 4


def test_a_sequence_that_grows_stays_where_its_last_block_is() -> None:
    blocks = pool(4, 8, 8)
    first = blocks.allocate(4)
    remote = blocks.allocate(2)
    blocks.release(first)
    assert all(4 <= block < 12 for block in blocks.allocate(6, after=remote[-1])), "although local blocks are free now"
    assert blocks.allocate(1, after=11)[0] < 4, "the region is full: as a new sequence"


def test_a_new_sequence_goes_to_the_worker_that_has_the_most_left_of_what_it_has() -> None:
    blocks = pool(0, 4, 12)
    regions = [int(blocks.allocate(1)[0] >= 4) for _ in range(16)]
    for count in range(4, 17, 4):
        assert regions[:count].count(0) == count // 4, regions


def test_a_worker_with_room_for_all_is_preferred_to_one_with_more_left_of_what_it_has() -> None:
    blocks = pool(0, 4, 16)
    blocks.allocate(6)
    assert {block // 4 > 0 for block in blocks.allocate(6)} == {True}, "the small one has room for 4"
    assert blocks.allocate(4) == [0, 1, 2, 3]


def test_cached_blocks_count_as_room_and_the_oldest_of_the_region_is_evicted() -> None:
    blocks = pool(2, 4)
    local, remote = blocks.allocate(2), blocks.allocate(4)
    for block in (*remote, *local):
        blocks.name(block, bytes([block]))
    blocks.release(remote)
    blocks.release(local)
    assert blocks.num_cached == 6
    assert blocks.allocate(1) == [1], "of the local blocks the one that was released first, though others are older"
    assert blocks.find(bytes([1])) is None and blocks.num_cached == 5
    assert blocks.allocate(1, after=2) == [5]


def test_attention_workers_learn_of_names_once_and_of_their_own_blocks_alone() -> None:
    blocks = pool(2, 4)
    blocks.allocate(6)
    for block in range(4):
        blocks.name(block, bytes([block]))
    assert blocks.take_changes() == (((2, b"\2"), (3, b"\3")), ())
    assert blocks.take_changes() == ((), ())
    blocks.release([2], retain=False)
    assert blocks.take_changes() == ((), (2,))
    blocks.release([0, 1, 3])
    blocks.forget_names()
    assert blocks.take_changes() == ((), (3,))
    assert (blocks.num_cached, blocks.num_free) == (0, 4)
    blocks.check()


def test_blocks_of_before_are_found_again_and_names_that_cannot_be_are_dropped() -> None:
    blocks = pool(2, 4)
    names = {1: b"local", 3: b"one", 4: b"two", 5: b"one", 6: b"not there"}
    assert blocks.adopt(names, stale=(0, 2, 9)) == 2
    assert (blocks.find(b"one"), blocks.find(b"two"), blocks.num_cached) == (3, 4, 2)
    assert blocks.find(b"local") is None and blocks.find(b"not there") is None
    assert blocks.take_changes() == ((), (2, 5)), "their holders are to forget them"
    assert blocks.is_adopted(3) and not blocks.is_adopted(5)
    blocks.share([3])
    blocks.check([[3]])
    blocks.release([3])
    assert blocks.allocate(4) and blocks.allocate(2)
    assert not blocks.is_adopted(3), "another text is in it"


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["new", "grow", "free", "name", "free", "forget"]), st.integers(0, 5), st.booleans()),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(local=st.integers(0, 8), remote=st.lists(st.integers(1, 8), min_size=1, max_size=3), operations=OPERATIONS)
def test_blocks_stay_in_their_region_while_it_has_room(
    local: int, remote: list[int], operations: list[tuple[str, int, bool]]
) -> None:
    blocks, residency = pool(local, *remote), requests(local, *remote)
    spans = [set(range(region.blocks.start, region.blocks.stop)) for region in residency.regions]
    tables: list[list[int]] = []
    num_named = 0

    def room(span: set[int]) -> int:
        return len(span) - len(span & {block for table in tables for block in table})

    for what, number, retain in operations:
        table = tables[number % len(tables)] if tables else []
        if what == "new" or (what == "grow" and table):
            after = table[-1] if what == "grow" else None
            if sum(map(room, spans)) < number:
                with pytest.raises(OutOfBlocks):
                    blocks.allocate(number, after=after)
                continue
            rooms = [room(span) for span in spans]
            taken = set(got := blocks.allocate(number, after=after))
            counts = [len(taken & span) for span in spans]
            stays = next((i for i, span in enumerate(spans) if after in span), None)
            if stays is not None:
                assert counts[stays] == min(number, rooms[stays])
            elif local:
                assert counts[0] == min(number, rooms[0])
            rest = [i for i in range(len(spans)) if i != stays and not (i == 0 and local)]
            left = sum(counts[i] for i in rest)
            if left and any(rooms[i] >= left for i in rest):
                assert sum(counts[i] > 0 for i in rest) == 1, "in one place, where that has room"
            if what == "grow":
                table += got
            elif got:
                tables.append(got)
        elif what == "free" and table:
            tables.remove(table)
            blocks.release(table, retain=retain)
        elif what == "name":
            for block in table:
                if block not in blocks._names:
                    num_named += 1
                    blocks.name(block, num_named.to_bytes(4, "little"))
        elif what == "forget" and number == 0:
            blocks.forget_names()
        blocks.check(tables)
        assert blocks.num_free == sum(map(room, spans))


@settings(max_examples=200, deadline=None)
@given(num_blocks=st.integers(1, 16), operations=OPERATIONS)
def test_one_region_allocates_the_same_blocks_whoever_holds_it(
    num_blocks: int, operations: list[tuple[str, int, bool]]
) -> None:
    heads = resident(
        Partition.KV_HEADS,
        (1, 1),
        num_kv_heads=2,
        block_size=4,
        num_local_blocks=0,
        num_remote_blocks=(num_blocks,) * 2,
    )
    pools = [
        BlockPool(num_blocks, 4),
        BlockPool(num_blocks, 4, everything_local(num_blocks)),
        BlockPool(num_blocks, 4, heads),
    ]
    tables: list[list[int]] = []
    for what, number, retain in operations:
        table = tables[number % len(tables)] if tables else []
        if what in ("new", "grow") and number <= pools[0].num_free:
            after = table[-1] if table and what == "grow" else None
            got = [each.allocate(number, after=after) for each in pools]
            assert got[0] == got[1] == got[2]
            tables += [got[0]] if got[0] else []
        elif what == "free" and table:
            tables.remove(table)
            for each in pools:
                each.release(table, retain=retain)
        elif what == "name" and table and table[0] not in pools[0]._names:
            for each in pools:
                each.name(table[0], bytes([number]))
