"""Checks the token budget that a replica serves with, given what it measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.measured.step_times import MeasuredStep, StepTimes
from placement.planning.limits import ReplicaLimits
from placement.serving.token_budget import budget_of, choose_token_budget

PROFILE = [(128, 0.010), (256, 0.018), (257, 0.024), (384, 0.026), (512, 0.034), (500, 0.030)]


@pytest.mark.parametrize(
    ("objective_s", "budget"),
    [
        (0.018, 256),  # meets it exactly
        (0.0259, 256),  # 257 would meet it, but is not aligned
        (0.030, 384),  # so would 500
        (1.0, 512),  # nothing beyond what was measured
        (0.001, 128),  # nothing meets it: the smallest tile
    ],
)
def test_token_budget_is_the_largest_aligned_size_within_the_objective(objective_s: float, budget: int) -> None:
    assert choose_token_budget(PROFILE, objective_s, 128) == budget


def limits(*, budget: int = 512, seqs: int = 32, step_time_s: float | None = 0.5) -> ReplicaLimits:
    return ReplicaLimits(block_size=16, token_budget=budget, max_num_seqs=seqs, step_time_s=step_time_s)


def proportional(token_s: float, *sizes: int) -> StepTimes:
    return StepTimes(steps=tuple(MeasuredStep(num_tokens=size, duration_s=size * token_s) for size in sizes))


def test_a_budget_that_is_set_stays_whatever_was_measured() -> None:
    chosen = budget_of(limits(budget=256, step_time_s=None), proportional(0.1, 1, 2, 4, 8))
    assert (chosen.token_budget, chosen.is_auto) == (256, False)
    assert chosen.expected_s == pytest.approx(25.6), "in proportion to the largest step that was measured"


@pytest.mark.parametrize(
    ("token_s", "budget", "expected_s"),
    [
        (0.0001, 512, 0.0512),  # the most that memory was planned for
        (0.003, 128, 0.384),
        (0.2, 48, 12.8),  # no size within the objective holds a decode of every sequence, and a piece of a prompt
    ],
)
def test_the_largest_budget_within_the_time_of_a_step_is_chosen(token_s: float, budget: int, expected_s: float) -> None:
    chosen = budget_of(limits(), proportional(token_s, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
    assert (chosen.token_budget, chosen.is_auto) == (budget, True)
    assert chosen.expected_s == pytest.approx(expected_s)


def test_without_measurements_the_budget_is_what_memory_was_planned_for() -> None:
    chosen = budget_of(limits(), StepTimes())
    assert (chosen.token_budget, chosen.is_auto, chosen.expected_s) == (512, True, 0.0)


@given(
    st.lists(st.floats(1e-4, 100.0), min_size=1, max_size=12),
    st.integers(1, 600),
    st.integers(0, 2000),
    st.floats(1e-3, 60.0),
)
def test_a_chosen_budget_holds_every_decode_and_fits_in_memory_and_time(
    durations_s: list[float], seqs: int, more: int, step_time_s: float
) -> None:
    times = StepTimes(
        steps=tuple(MeasuredStep(num_tokens=2**place, duration_s=took_s) for place, took_s in enumerate(durations_s))
    )
    chosen = budget_of(limits(budget=seqs + more, seqs=seqs, step_time_s=step_time_s), times)
    assert seqs <= chosen.token_budget <= seqs + more
    took_s = {step.num_tokens: step.duration_s for step in times.steps}
    assert chosen.token_budget <= seqs + 16 or took_s[chosen.token_budget] <= step_time_s
    assert chosen.token_budget >= seqs + min(16, more), "a prompt goes on beside all decodes"
