"""What attention workers answer equals dense attention, however the work is divided."""

from itertools import pairwise

import pytest
import torch

from placement.serving.offload.deltas import Begun
from placement.serving.offload.orders import QuerySpan, StepOrder
from tests.support.attention_sessions import (
    BLOCK_SIZE,
    Holding,
    RandomRank,
    attention_worker,
    geometry_of,
    open_session,
)

STEPS = [{0: 7, 1: 2}, {0: 1, 1: 1, 2: 5}, {0: 1, 1: 4, 2: 1}, {1: 1, 2: 1}]


def tables_for(rank: RandomRank) -> None:
    rank.tables = {0: (5, 1, 9), 1: (2, 30, 11), 2: (7, 8, 6)}


def check(rank: RandomRank, steps: list[dict[int, int]], tolerance: float = 1e-5) -> None:
    for chunks in steps:
        for found, expected in rank.step(chunks):
            torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("q_first", [False, True])
@pytest.mark.parametrize(("group", "itemsize", "window"), [(1, 4, None), (4, 4, 3), (8, 4, 6), (4, 2, None)])
def test_final_answers_equal_dense_attention(group: int, itemsize: int, window: int | None, q_first: bool) -> None:
    geometry = geometry_of(
        num_heads=2 * group, itemsize=itemsize, windows=(None, window), window_of=(0, 1), q_first=q_first
    )
    with attention_worker() as (_, address):
        session = open_session(address, geometry)
        rank = RandomRank([Holding(session=session, heads=range(2))], num_kv_heads=2, group=group)
        tables_for(rank)
        check(rank, STEPS, 1e-5 if itemsize == 4 else 0.05)


@pytest.mark.parametrize("q_first", [False, True])
@pytest.mark.parametrize("division", ["heads", "stripes", "regions"])
def test_merged_answers_of_two_workers_equal_dense_attention(division: str, q_first: bool) -> None:
    own = {
        "heads": ({"heads": range(1)}, {"heads": range(1, 2)}),
        "stripes": ({"heads": range(2), "slots": range(1)}, {"heads": range(2), "slots": range(1, BLOCK_SIZE)}),
        "regions": ({"heads": range(2), "places": range(1)}, {"heads": range(2), "places": range(1, 9)}),
    }[division]
    with attention_worker() as (_, first), attention_worker() as (_, second):
        holdings = []
        for address, part in zip((first, second), own, strict=True):
            width, heads = len(part.get("slots", range(BLOCK_SIZE))), len(part["heads"])
            windows = {"windows": (None, 5), "window_of": (0, 1)}
            geometry = geometry_of(width=width, num_kv_heads=heads, num_heads=4 * heads, q_first=q_first, **windows)
            holdings.append(Holding(session=open_session(address, geometry), **part))
        rank = RandomRank(holdings, num_kv_heads=2, group=4)
        tables_for(rank)
        check(rank, STEPS)


def test_forks_share_blocks_and_copy_those_that_they_write_to() -> None:
    with attention_worker() as (_, address):
        rank = RandomRank([Holding(session=open_session(address), heads=range(2))], num_kv_heads=2, group=2)
        rank.tables = {0: (3, 4)}
        check(rank, [{0: 6}])
        rank.fork(0, 1, (3, 4))
        check(rank, [{0: 1}])
        rank.lengths[1], rank.tables[1] = 6, (3, 9)  # its last block is its own now, with two tokens of the other's
        check(rank, [{1: 1}, {0: 1, 1: 1}])


def test_two_orders_may_be_under_way_and_answers_do_not_depend_on_which_rows_come_first() -> None:
    geometry = geometry_of()
    random = torch.Generator().manual_seed(1)
    rows = {
        (order, layer): [torch.randn(1, heads, 16, generator=random) for heads in (4, 2, 2)]
        for order in range(2)
        for layer in range(2)
    }
    orders = [
        StepOrder(
            tables=(Begun(sequence=n, blocks=(n,)),),
            spans=(QuerySpan(sequence=n, num_queries=1, num_new=1, seen=(((0, 1),),)),),
            num_whole=n,
            slots=(n * BLOCK_SIZE,),
        )
        for n in range(2)
    ]
    results = []
    with attention_worker() as (_, address):
        for epoch, kv_first in enumerate([False, True, False], start=1):
            session = open_session(address, geometry, epoch=epoch)
            numbers = [session.order(order) for order in orders]
            found = []
            for layer in range(2):
                for n, number in enumerate(numbers):
                    query, keys, values = rows[n, layer]
                    parts = [(query, None, None), (None, keys, values)]
                    for part in parts[::-1] if kv_first else parts:
                        session.send(number, layer, *part)
                for number in reversed(numbers):
                    answer = session.result(number, layer)
                    found += [answer.whole.clone(), answer.parts.clone(), answer.mass.clone()]
            results.append(found)
    for first, second in pairwise(results):
        for left, right in zip(first, second, strict=True):
            assert torch.equal(left, right)


def test_payload_is_exactly_what_lamina_says_and_frames_add_less_than_a_hundredth() -> None:
    layers, batch, heads, kv_heads, dim = 30, 8, 9, 3, 64
    for q_first in (False, True):
        geometry = geometry_of(
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            itemsize=2,
            window_of=(0,) * layers,
            q_first=q_first,
        )
        with attention_worker() as (_, address):
            session = open_session(address, geometry)
            tables = tuple(Begun(sequence=n, blocks=(n,)) for n in range(batch))
            spans = tuple(QuerySpan(sequence=n, num_queries=1, num_new=1, seen=(((0, 1),),)) for n in range(batch))
            slots = tuple(n * BLOCK_SIZE for n in range(batch))
            number = session.order(StepOrder(tables=tables, spans=spans, num_whole=batch, slots=slots))
            for layer in range(layers):
                query, kv = torch.zeros(batch, heads, dim).bfloat16(), torch.zeros(batch, kv_heads, dim).bfloat16()
                session.send(number, layer, query, kv, kv)
                session.result(number, layer)
            counts = session.counts
        payload = counts.payload_in + counts.payload_out
        assert payload == layers * batch * (2 * heads * dim + 2 * kv_heads * dim) * 2
        assert counts.frame_out + counts.frame_in < payload / 100
