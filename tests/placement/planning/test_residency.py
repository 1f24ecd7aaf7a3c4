"""Every KV head of every slot of every block is at one place, whatever the attention workers' speeds."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.planning.residency import Partition, Residency, everything_local, head_spans, resident, slot_spans

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(0.05, 20.0)), min_size=1, max_size=6).filter(any)


def times_held(residency: Residency, num_kv_heads: int, block_size: int) -> list[int]:
    """How often each KV head of a slot of a block that is not local is held, each distinct number once."""
    counts = np.zeros((residency.num_blocks, num_kv_heads, block_size), np.int64)
    counts[: residency.num_local_blocks] = 1
    for region in residency.regions:
        blocks = slice(region.blocks.start, region.blocks.stop)
        for holder in region.holders:
            slots = slice(None) if holder.stripe is None else slice(holder.stripe.start, holder.stripe.stop)
            counts[blocks, holder.kv_heads.start : holder.kv_heads.stop, slots] += 1
    return sorted({int(count) for count in counts.flat})


def assert_within_one_unit(counts: Sequence[int], weights: Sequence[float]) -> None:
    """No worker has so many that one of them would be better with another, and all have their whole share."""
    pairs = list(zip(counts, weights, strict=True))
    assert not any(count for count, weight in pairs if not weight)
    for count, weight in pairs:
        if count:
            assert all(
                count / weight <= (other + 1) / other_weight * (1 + 1e-9)
                for other, other_weight in pairs
                if other_weight
            )
        assert count >= int(sum(counts) * weight / sum(weights) * (1 - 1e-9))


@given(
    partition=st.sampled_from(Partition),
    weights=WEIGHTS,
    num_kv_heads=st.integers(1, 16),
    block_size=st.integers(1, 16),
    num_local=st.integers(0, 5),
    num_remote=st.integers(1, 9),
)
def test_everything_is_held_once(
    partition: Partition, weights: list[float], num_kv_heads: int, block_size: int, num_local: int, num_remote: int
) -> None:
    found = resident(
        partition,
        weights,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        num_local_blocks=num_local,
        num_remote_blocks=[num_remote] * len(weights),
    )
    assert found.num_local_blocks == num_local and times_held(found, num_kv_heads, block_size) == [1]
    assert all(weights[worker] for worker in found.workers)


@given(weights=WEIGHTS, count=st.integers(1, 64))
def test_heads_and_slots_are_dealt_out_by_weight(weights: list[float], count: int) -> None:
    for spans in (head_spans(count, weights), slot_spans(count, weights)):
        assert sum(map(len, spans)) == count
        assert_within_one_unit([len(span) for span in spans], weights)


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 0, 3]])
def test_more_workers_than_heads_leave_some_idle(weights: list[float]) -> None:
    assert sum(1 for span in head_spans(1, weights) if span) == 1


def test_workers_that_divide_blocks_have_as_many_as_the_one_with_the_fewest() -> None:
    sizes = {"num_kv_heads": 4, "block_size": 8, "num_local_blocks": 2, "num_remote_blocks": [9, 5]}
    assert resident(Partition.KV_HEADS, [1, 1], **sizes).num_blocks == 7
    assert resident(Partition.REQUESTS, [1, 1], **sizes).num_blocks == 16


def test_without_attention_workers_everything_is_local() -> None:
    assert everything_local(7).num_local_blocks == everything_local(7).num_blocks == 7
