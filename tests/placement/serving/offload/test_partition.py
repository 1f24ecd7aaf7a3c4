"""Every KV head of every token has one attention worker, whatever the workers' speeds."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.model.part import Span
from placement.planning.splitting import deal
from placement.serving.offload.partition import (
    AttentionShare,
    RequestLoad,
    assigned_worker,
    assigned_workers,
    block_owners,
    head_shares,
    head_spans,
    own_blocks,
    request_shares,
    token_runs_of,
    token_shares,
)

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(0.05, 20.0)), min_size=1, max_size=6).filter(any)


def times_covered(shares: Iterable[AttentionShare], num_kv_heads: int, num_tokens: int) -> list[int]:
    """How often each pair of a KV head and a token is attended to, each distinct number once."""
    counts = np.zeros((num_kv_heads, num_tokens), np.int64)
    for share in shares:
        assert share.kv_heads and all(share.tokens)
        for span in share.tokens:
            counts[share.kv_heads.start : share.kv_heads.stop, span.start : span.stop] += 1
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


@given(weights=WEIGHTS, num_kv_heads=st.integers(1, 64), num_tokens=st.integers(1, 40))
def test_heads_are_dealt_out_whole_and_each_once(weights: list[float], num_kv_heads: int, num_tokens: int) -> None:
    assert times_covered(head_shares(num_kv_heads, weights, num_tokens), num_kv_heads, num_tokens) == [1]
    assert_within_one_unit([len(span) for span in head_spans(num_kv_heads, weights)], weights)


@given(weights=WEIGHTS, block_size=st.integers(1, 8), num_tokens=st.integers(1, 100))
def test_token_ranges_cover_a_sequence_once_and_are_cut_at_blocks(
    weights: list[float], block_size: int, num_tokens: int
) -> None:
    shares = token_shares(2, weights, num_tokens, block_size=block_size)
    assert times_covered(shares, 2, num_tokens) == [1]
    for share in shares:
        assert all(left.stop < right.start for left, right in zip(share.tokens, share.tokens[1:], strict=False))
        for span in share.tokens:
            assert span.start % block_size == 0
            assert span.stop % block_size == 0 or span.stop == num_tokens


@given(weights=WEIGHTS, num_blocks=st.integers(0, 70))
def test_blocks_are_dealt_out_as_heads_are_at_any_length(weights: list[float], num_blocks: int) -> None:
    owners = block_owners(num_blocks, weights)
    counts = [Counter(owners)[worker] for worker in range(len(weights))]
    assert tuple(counts) == deal(num_blocks, weights)
    assert_within_one_unit(counts, weights)


@given(weights=WEIGHTS, table=st.lists(st.integers(0, 999), max_size=70), num_new=st.integers(0, 9))
def test_a_growing_sequence_leaves_its_blocks_where_they_are(
    weights: list[float], table: list[int], num_new: int
) -> None:
    grown = [*table, *range(1000, 1000 + num_new)]
    for worker in range(len(weights)):
        before = own_blocks(table, weights, worker)
        assert own_blocks(grown, weights, worker)[: len(before)] == before
    assert sorted(block for worker in range(len(weights)) for block in own_blocks(grown, weights, worker)) == sorted(
        grown
    )


def test_equal_workers_take_turns() -> None:
    assert token_runs_of(10, 4, [1, 1]) == ((Span(0, 4), Span(8, 10)), (Span(4, 8),))


def test_an_empty_sequence_has_no_shares() -> None:
    assert head_shares(4, [1, 1], 0) == request_shares(0, 4, 0) == token_shares(4, [1, 1], 0, block_size=4) == ()


def test_a_request_is_attended_to_by_one_worker() -> None:
    shares = request_shares(1, 4, 9)
    assert [share.worker for share in shares] == [1]
    assert times_covered(shares, 4, 9) == [1]


@given(weights=WEIGHTS, lengths=st.lists(st.integers(1, 500), max_size=40))
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


def loads(*num_tokens: int, free_blocks: int = 10) -> list[RequestLoad]:
    return [RequestLoad(num_tokens=count, free_blocks=free_blocks) for count in num_tokens]


def test_a_new_request_goes_where_it_is_read_soonest() -> None:
    assert assigned_worker(loads(100, 100), [1, 2], tokens=50, blocks=4) == 1
    assert assigned_worker(loads(100, 300), [1, 2], tokens=50, blocks=4) == 0
    assert assigned_worker(loads(0, 0), [1, 1], tokens=50, blocks=4) == 0
    assert assigned_worker(loads(900, 0), [1, 0], tokens=50, blocks=4) == 0


def test_a_new_request_goes_only_where_there_is_room() -> None:
    full, other = RequestLoad(num_tokens=0, free_blocks=3), RequestLoad(num_tokens=900, free_blocks=4)
    assert assigned_worker([full, other], [1, 1], tokens=50, blocks=4) == 1
    assert assigned_worker([full, full], [1, 1], tokens=50, blocks=4) is None


def test_blocks_that_a_worker_has_already_need_no_room_and_decide_between_equals() -> None:
    sharing = RequestLoad(num_tokens=0, free_blocks=2, shared_blocks=2)
    assert assigned_worker([RequestLoad(num_tokens=0, free_blocks=9), sharing], [1, 1], tokens=50, blocks=4) == 1


@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 0, 3]])
def test_more_workers_than_heads_leave_some_idle(weights: list[float]) -> None:
    assert sum(1 for span in head_spans(1, weights) if span) == 1
