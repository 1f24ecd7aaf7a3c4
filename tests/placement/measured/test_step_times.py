"""Checks which steps a warm-up measures, and what is expected of others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.measured.step_times import (
    LEAST_CHUNK,
    WARM_UP_S,
    MeasuredStep,
    StepTimes,
    is_believed,
    most_spent_s,
    next_size,
)


def times(*steps: tuple[int, float]) -> StepTimes:
    return StepTimes(steps=tuple(MeasuredStep(num_tokens=count, duration_s=took_s) for count, took_s in steps))


def measured(
    token_s: float, most_tokens: int, *, step_time_s: float | None, fixed_s: float = 0.0
) -> tuple[StepTimes, float]:
    """The steps that are measured where one takes ``fixed_s`` and ``token_s`` a token, and all their seconds."""
    found, spent_s = StepTimes(), 0.0
    while size := next_size(found, most_tokens=most_tokens, spent_s=spent_s, step_time_s=step_time_s):
        spent_s += fixed_s + size * token_s
        found = found.with_step(size, fixed_s + size * token_s)
    return found, spent_s


def sizes(found: StepTimes) -> list[int]:
    return [step.num_tokens for step in found.steps]


def test_sizes_double_up_to_the_most_tokens_of_a_step() -> None:
    assert sizes(measured(1e-4, 24, step_time_s=0.5)[0]) == [1, 2, 4, 8, 16, 24]
    assert sizes(measured(1e-4, 24, step_time_s=None)[0]) == [1, 2, 4, 8, 16, 24]
    assert sizes(measured(1e-4, 1, step_time_s=0.5)[0]) == [1]
    assert sizes(measured(1e-4, 0, step_time_s=0.5)[0]) == []


def test_the_first_size_that_takes_longer_than_a_step_may_is_the_last() -> None:
    assert sizes(measured(0.01, 512, step_time_s=0.5)[0]) == [1, 2, 4, 8, 16, 32, 64]


def test_on_the_slowest_machine_one_chunk_is_measured_and_no_more() -> None:
    for step_time_s in (0.5, None):
        assert sizes(measured(20.0, 512, step_time_s=step_time_s)[0]) == [1, LEAST_CHUNK]


def test_without_an_objective_the_time_of_one_size_decides_whether_the_next_is_measured() -> None:
    found, spent_s = measured(0.1, 256, step_time_s=None)
    assert sizes(found) == [1, 2, 4, 8, 16]
    assert spent_s <= WARM_UP_S < spent_s + 2 * found.steps[-1].duration_s


@given(st.floats(1e-6, 10.0), st.floats(0.0, 1.0), st.integers(1, 4096), st.one_of(st.none(), st.floats(1e-3, 60.0)))
def test_measuring_takes_no_longer_than_the_bound_or_its_smallest_steps(
    token_s: float, fixed_s: float, most_tokens: int, step_time_s: float | None
) -> None:
    found, spent_s = measured(token_s, most_tokens, step_time_s=step_time_s, fixed_s=fixed_s)
    smallest_s = sum(step.duration_s for step in found.steps if step.num_tokens <= LEAST_CHUNK)
    assert spent_s <= max(most_spent_s(step_time_s), smallest_s) * (1 + 1e-9)


@given(st.floats(1e-6, 10.0), st.integers(1, 4096), st.floats(1e-3, 60.0))
def test_where_time_follows_tokens_the_objective_ends_the_measurement_and_not_the_bound(
    token_s: float, most_tokens: int, step_time_s: float
) -> None:
    found, _ = measured(token_s, most_tokens, step_time_s=step_time_s)
    assert sizes(found)[-1] in (LEAST_CHUNK, most_tokens) or found.steps[-1].duration_s > step_time_s


@pytest.mark.parametrize(("num_tokens", "expected_s"), [(1, 0.5), (2, 0.5), (3, 0.8), (4, 0.8), (8, 1.6), (400, 80.0)])
def test_a_step_is_expected_to_take_what_the_sizes_around_it_took(num_tokens: int, expected_s: float) -> None:
    found = times((1, 0.5), (2, 0.4), (4, 0.8))  # the first was held up
    assert found.expected_s(num_tokens) == pytest.approx(expected_s)


def test_nothing_is_expected_where_nothing_was_measured() -> None:
    assert StepTimes().expected_s(64) == 0.0


def test_a_measurement_that_is_too_long_is_made_once_more() -> None:
    found = times((1, 0.01), (2, 0.015))
    assert not is_believed(StepTimes(), 1, 0.01, step_time_s=None), "the first step of all compiles code"
    assert is_believed(found, 4, 0.03, step_time_s=0.5)
    assert not is_believed(found, 4, 0.0301, step_time_s=0.5)
    assert not is_believed(times((64, 0.4)), 128, 0.6, step_time_s=0.5), "it would end the measurement"
    assert is_believed(times((64, 0.4)), 128, 0.6, step_time_s=None)
    assert is_believed(times((1, 0.6)), 2, 1.2, step_time_s=0.5), "the size before has ended it already"


def test_a_log_line_has_every_size_with_its_time() -> None:
    assert str(times((1, 0.0123), (2, 1.5), (8, 123.4))) == "1:0.012s 2:1.5s 8:123s"
