"""Checks which exchange is chosen where the arithmetic is clear."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.measured.exchange import Exchange, ExchangeSizes, ExchangeSpeeds, choose, layer_s

NO_LIMIT = 1 << 40
SPEEDS = ExchangeSpeeds(latency_s=1e-3, bytes_per_s=1e8, pairs_per_s=(1e9,) * 2, call_s=0.0)


def sizes(*, group: int, num_queries: int = 2048, num_before: int = 0, num_ranks: int = 2) -> ExchangeSizes:
    """Makes the sizes of a chunk with tokens before it, in a layer whose queries are 2048 bfloat16 numbers."""
    return ExchangeSizes(
        shares=(1 / num_ranks,) * num_ranks,
        num_queries=num_queries,
        num_seen=num_before + num_queries,
        num_pairs=num_queries * num_before + num_queries**2 // 2,
        query_bytes=4096,
        kv_bytes=2 * 4096 // group,
    )


def test_kv_moves_where_queries_share_it() -> None:
    assert choose(sizes(group=8), SPEEDS, most_kv_tokens=NO_LIMIT) is not Exchange.TOKEN_RING


def test_queries_move_where_much_came_before() -> None:
    assert choose(sizes(group=8, num_before=100_000), SPEEDS, most_kv_tokens=NO_LIMIT) is Exchange.TOKEN_RING


def test_without_grouped_heads_a_query_and_its_answer_take_as_much_as_a_tokens_kv() -> None:
    slow = ExchangeSpeeds(latency_s=0.0, bytes_per_s=1e7, pairs_per_s=(1e12,) * 4, call_s=0.0)
    wanted = sizes(group=1, num_ranks=4)
    assert layer_s(Exchange.TOKEN_RING, wanted, slow) == pytest.approx(layer_s(Exchange.RING, wanted, slow), rel=0.01)
    assert choose(sizes(group=1, num_ranks=4, num_before=512), slow, most_kv_tokens=NO_LIMIT) is Exchange.TOKEN_RING


def test_one_latency_is_less_than_several_where_little_moves() -> None:
    few = sizes(group=8, num_queries=64, num_ranks=4)
    speeds = replace(SPEEDS, pairs_per_s=(1e12,) * 4)
    assert choose(few, speeds, most_kv_tokens=NO_LIMIT) is Exchange.ALL_GATHER


def test_a_ring_hides_what_moves_behind_attention() -> None:
    """Four ranks' attention takes as long as a round of the ring, so all rounds but the first are hidden."""
    wanted = sizes(group=1, num_ranks=4)
    speeds = ExchangeSpeeds(latency_s=0.0, bytes_per_s=1e8, pairs_per_s=(3.1e6,) * 4, call_s=0.0)
    gathered, ring = layer_s(Exchange.ALL_GATHER, wanted, speeds), layer_s(Exchange.RING, wanted, speeds)
    assert ring < 0.8 * gathered


def test_no_more_kv_moves_than_there_is_room_for() -> None:
    wanted = sizes(group=8)
    assert choose(wanted, SPEEDS, most_kv_tokens=wanted.num_seen) is not Exchange.TOKEN_RING
    assert choose(wanted, SPEEDS, most_kv_tokens=wanted.num_seen - 1) is Exchange.TOKEN_RING


@given(
    num_ranks=st.integers(2, 5),
    group=st.sampled_from([1, 4, 8]),
    num_queries=st.integers(2, 4096),
    num_before=st.integers(0, 100_000),
    latency_s=st.floats(0, 0.01),
    bytes_per_s=st.floats(1e6, 1e10),
    pairs_per_s=st.floats(1e6, 1e12),
)
def test_more_is_never_expected_to_take_less(
    num_ranks: int,
    group: int,
    num_queries: int,
    num_before: int,
    latency_s: float,
    bytes_per_s: float,
    pairs_per_s: float,
) -> None:
    wanted = sizes(group=group, num_queries=num_queries, num_before=num_before, num_ranks=num_ranks)
    speeds = ExchangeSpeeds(latency_s=latency_s, bytes_per_s=bytes_per_s, pairs_per_s=(pairs_per_s,) * num_ranks)
    slower = replace(speeds, latency_s=latency_s + 0.001, bytes_per_s=bytes_per_s / 2)
    for way in Exchange:
        took_s = layer_s(way, wanted, speeds)
        assert layer_s(way, wanted, slower) >= took_s
        assert took_s >= num_queries * num_before / num_ranks / pairs_per_s  # nobody has less to attend to
