"""Checks that every token belongs to one rank's stripe, and that each rank has its share of any run of tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.model.striping import Stripe

STRIPES = (Stripe(0, 10, 16), Stripe(10, 14, 16), Stripe(14, 14, 16), Stripe(14, 16, 16))


@given(start=st.integers(0, 200), count=st.integers(0, 200))
def test_every_token_is_held_once(start: int, count: int) -> None:
    positions = np.concatenate([stripe.positions(start, start + count) for stripe in STRIPES])
    assert sorted(positions) == list(range(start, start + count))


@given(start=st.integers(0, 200), count=st.integers(0, 400))
def test_each_has_its_share_of_any_run_of_tokens_but_for_the_ends(start: int, count: int) -> None:
    for stripe in STRIPES:
        held = len(stripe.positions(start, start + count))
        assert abs(held - stripe.share * count) < stripe.block_size


@given(num_tokens=st.integers(0, 500))
def test_counts_are_those_of_positions(num_tokens: int) -> None:
    for stripe in STRIPES:
        held = stripe.positions(0, num_tokens)
        assert stripe.count(num_tokens) == len(held)
        assert stripe.counts(held).tolist() == list(range(len(held)))  # where each lies: no gaps


@given(blocks=st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True), rest=st.integers(1, 16))
def test_runs_are_the_ranks_own_slots_in_token_order(blocks: list[int], rest: int) -> None:
    runs = [(16 * block, 16 * block + 16) for block in blocks[:-1]] + [(16 * blocks[-1], 16 * blocks[-1] + rest)]
    slots = [slot for run in runs for slot in range(*run)]
    for stripe in STRIPES:
        held = [slot // 16 * stripe.width + slot % 16 - stripe.start for slot in slots if _is_in(stripe, slot)]
        found = stripe.runs(np.array(runs, np.int64)).tolist()
        assert [slot for run in found for slot in range(*run)] == held


def _is_in(stripe: Stripe, slot: int) -> bool:
    return stripe.start <= slot % stripe.block_size < stripe.stop


def test_a_stripe_is_within_its_block() -> None:
    with pytest.raises(AssertionError):
        Stripe(3, 17, 16)
