"""Which blocks of attention workers are used again."""

from placement.model.part import Span
from placement.planning.residency import Partition, Residency, resident
from placement.serving.offload.adoption import agree, emptiest


def residency(partition: Partition) -> Residency:
    return resident(partition, (1, 1), num_kv_heads=2, block_size=4, num_local_blocks=2, num_remote_blocks=(3, 3))


def test_a_block_counts_where_all_that_hold_a_part_of_it_have_the_same_text() -> None:
    for partition in (Partition.KV_HEADS, Partition.TOKEN_RANGES):
        held = {0: {2: b"a", 3: b"b", 4: b"c"}, 1: {2: b"a", 3: b"other"}}
        agreed = agree(residency(partition), held)
        assert (agreed.names, agreed.stale) == ({2: b"a"}, (3, 4))


def test_a_worker_that_has_nothing_leaves_nothing_of_what_it_shares() -> None:
    agreed = agree(residency(Partition.KV_HEADS), {1: {2: b"a"}})
    assert (agreed.names, agreed.stale) == ({}, (2,))


def test_where_requests_are_divided_each_worker_speaks_for_its_own_blocks() -> None:
    held = {0: {2: b"a", 5: b"of the other"}, 1: {6: b"b", 1: b"local"}}
    agreed = agree(residency(Partition.REQUESTS), held)
    assert (agreed.names, agreed.stale) == ({2: b"a", 6: b"b"}, (1, 5))


def test_room_is_made_where_the_fewest_blocks_are_kept() -> None:
    assert emptiest({0, 1, 4, 6}, 8, 2) == Span(2, 4)
    assert emptiest({0, 1, 4, 6}, 8, 3) == Span(1, 4), "the first of those that give up one block"
    assert emptiest(set(range(8)), 8, 3) == Span(0, 3)
    assert emptiest({5}, 8, 99) == Span(0, 8)
