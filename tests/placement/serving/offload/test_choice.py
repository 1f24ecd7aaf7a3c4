"""The partition is the one whose slowest worker is done first, and KV heads where that hardly matters."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.model.layers import Gqa
from placement.model.specs import DType
from placement.planning.residency import Partition
from placement.serving.offload.choice import (
    AttentionWorker,
    PartitionChoice,
    assigned_workers,
    choose_partition,
    partition_loads,
    typical_shares,
)
from placement.serving.offload.wire_bytes import token_range_bytes, whole_head_bytes

F32 = DType.FLOAT32
GROUPED = Gqa(num_heads=32, num_kv_heads=8, head_dim=64)
FEW_HEADS = Gqa(num_heads=8, num_kv_heads=2, head_dim=64)
BLOCK = 16


def workers(*kv_rates: float, link: float = 1e9) -> list[AttentionWorker]:
    return [AttentionWorker(kv_bytes_per_s=rate, link_bytes_per_s=link, kv_cache_bytes=2**30) for rate in kv_rates]


def chosen(
    them: Sequence[AttentionWorker], attention: Gqa, contexts: Sequence[int], asked: Partition | None = None
) -> PartitionChoice:
    return choose_partition(them, attention, F32, contexts, block_size=BLOCK, asked=asked)


def test_heads_are_divided_where_they_divide_evenly() -> None:
    assert chosen(workers(1e9, 1e9), GROUPED, [100, 2000, 700]).partition is Partition.KV_HEADS
    assert chosen(workers(1e9, 3e9), GROUPED, [100, 2000, 700]).partition is Partition.KV_HEADS


def test_requests_are_divided_where_there_are_many_and_heads_are_too_few() -> None:
    choice = chosen(workers(1e9, 1e9, 1e9), FEW_HEADS, [900] * 30)
    assert choice.partition is Partition.REQUESTS
    assert not choice.idle


def test_token_ranges_are_divided_where_one_long_sequence_would_leave_workers_idle() -> None:
    assert chosen(workers(1e9, 1e9, 1e9), FEW_HEADS, [50_000]).partition is Partition.TOKEN_RANGES


def test_over_slow_links_a_long_sequence_keeps_its_heads_whole() -> None:
    assert chosen(workers(1e9, 1e9, 1e9, link=1e5), FEW_HEADS, [50_000]).partition is Partition.KV_HEADS


def test_what_the_configuration_says_is_done_and_explained() -> None:
    choice = chosen(workers(1e9, 1e9, 1e9), FEW_HEADS, [900] * 30, Partition.KV_HEADS)
    assert choice.partition is Partition.KV_HEADS
    assert choice.idle == (2,)
    assert "as the configuration says" in choice.reason
    assert "1 of the workers have nothing to do" in choice.reason
    assert all(f"{1e3 * seconds:.3g} ms" in choice.reason for seconds in choice.layer_s.values())


def test_a_window_bounds_what_is_read() -> None:
    windowed = Gqa(num_heads=8, num_kv_heads=2, head_dim=64, window=128)
    for partition in Partition:
        far, near = (
            partition_loads(partition, workers(1e9, 1e9), windowed, F32, [context], block_size=BLOCK)
            for context in (4096, 128)
        )
        assert far == near


@given(
    rates=st.lists(st.floats(1e8, 1e10), min_size=1, max_size=5),
    contexts=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
    partition=st.sampled_from(Partition),
)
def test_all_keys_values_and_messages_are_counted(
    rates: list[float], contexts: list[int], partition: Partition
) -> None:
    loads = partition_loads(partition, workers(*rates), GROUPED, F32, contexts, block_size=BLOCK)
    whole = whole_head_bytes(GROUPED, F32)
    assert sum(load.kv_bytes for load in loads) == pytest.approx(sum(contexts) * (whole.key + whole.value))
    wire_bytes = sum(load.wire_bytes for load in loads)
    if partition is Partition.TOKEN_RANGES:
        most = token_range_bytes(GROUPED, F32, num_holders=len(rates)).total
        assert len(contexts) * whole.total <= wire_bytes <= len(contexts) * most
    else:
        assert wire_bytes == pytest.approx(len(contexts) * whole.total)


@given(
    rates=st.lists(st.floats(1e8, 1e10), min_size=1, max_size=5),
    contexts=st.lists(st.integers(1, 3000), min_size=1, max_size=12),
)
def test_nothing_is_chosen_that_is_much_slower_than_the_fastest(rates: list[float], contexts: list[int]) -> None:
    choice = chosen(workers(*rates), GROUPED, contexts)
    assert choice.layer_s[choice.partition] * 0.95 <= min(choice.layer_s.values()) * (1 + 1e-9)


@pytest.mark.parametrize("partition", Partition)
def test_typical_shares_are_of_all(partition: Partition) -> None:
    shares, wire_bytes = typical_shares(partition, workers(1e9, 3e9), GROUPED, F32, 4096, block_size=BLOCK)
    assert shares == pytest.approx((0.25, 0.75))
    whole = whole_head_bytes(GROUPED, F32)
    if partition is Partition.TOKEN_RANGES:
        assert sum(wire_bytes) == token_range_bytes(GROUPED, F32, num_holders=2).total
    else:
        assert wire_bytes == pytest.approx((whole.total / 4, 3 * whole.total / 4))


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(0.05, 20.0)), min_size=1, max_size=6).filter(any),
    lengths=st.lists(st.integers(1, 500), max_size=40),
)
def test_requests_are_assigned_by_load_and_weight(weights: list[float], lengths: list[int]) -> None:
    owners = assigned_workers(dict(enumerate(lengths)), weights)
    assert owners.keys() == dict(enumerate(lengths)).keys()
    loads = [sum(lengths[it] for it, owner in owners.items() if owner == worker) for worker in range(len(weights))]
    for worker, weight in enumerate(weights):
        own = [lengths[it] for it, owner in owners.items() if owner == worker]
        if not own:
            continue
        for other, other_weight in enumerate(weights):
            if other_weight:  # its shortest came last, and would have ended later anywhere else
                assert loads[worker] / weight <= (loads[other] + min(own)) / other_weight * (1 + 1e-9)
