"""Checks which steps are overlapped, given what was measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.measured.overlap import (
    MICRO_BATCH_TOKENS,
    MeasuredOverlap,
    OverlapTable,
    first_micro_batch,
    measured_sizes,
)

TABLE = OverlapTable(num_tokens=(64, 128, 256), alone_s=(1.0, 2.0, 4.0), overlapped_s=(1.2, 1.5, 3.0))


@pytest.mark.parametrize(
    ("num_tokens", "pays"),
    [(1, False), (63, False), (64, False), (100, False), (128, True), (200, True), (256, True), (5000, True)],
)
def test_a_step_is_overlapped_where_both_measured_neighbours_gained(num_tokens: int, pays: bool) -> None:
    assert TABLE.pays(num_tokens) is pays


def test_a_gain_within_the_noise_is_none() -> None:
    assert not OverlapTable(num_tokens=(64,), alone_s=(1.0,), overlapped_s=(0.98,)).pays(64)
    assert OverlapTable(num_tokens=(64,), alone_s=(1.0,), overlapped_s=(0.96,)).pays(64)


def test_what_was_measured_says_which_steps_are_overlapped() -> None:
    assert TABLE.measured == (
        MeasuredOverlap(num_tokens=64, alone_s=1.0, overlapped_s=1.2, is_overlapped=False),
        MeasuredOverlap(num_tokens=128, alone_s=2.0, overlapped_s=1.5, is_overlapped=True),
        MeasuredOverlap(num_tokens=256, alone_s=4.0, overlapped_s=3.0, is_overlapped=True),
    )
    assert OverlapTable().measured == ()


def test_nothing_is_overlapped_before_anything_is_measured() -> None:
    assert not OverlapTable().pays(4096)


@given(st.integers(2 * MICRO_BATCH_TOKENS, 10_000))
def test_lanes_are_halves_of_whole_tiles(num_tokens: int) -> None:
    first = first_micro_batch(num_tokens)
    assert first % MICRO_BATCH_TOKENS == 0
    assert abs(first - num_tokens / 2) <= MICRO_BATCH_TOKENS / 2
    assert min(first, num_tokens - first) >= MICRO_BATCH_TOKENS


def test_sizes_are_measured_up_to_the_budget() -> None:
    assert list(measured_sizes(1000)) == [64, 128, 256, 512]
    assert list(measured_sizes(32)) == []
