"""Checks how long a step may take before a replica counts as stalled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.measured.patience import FACTOR, WINDOW_STEPS, Patience

SECONDS = st.floats(0.0, 1e4)


def after(patience: Patience, durations_s: list[float]) -> Patience:
    for duration_s in durations_s:
        patience = patience.after(duration_s)
    return patience


def test_a_fast_replica_is_given_the_floor_and_a_slow_one_ten_of_its_steps() -> None:
    patience = Patience(floor_s=30.0)
    assert patience.limit_s == 30.0
    assert after(patience, [0.02, 2.9, 0.02]).limit_s == 30.0
    assert after(patience, [0.02, 8.4, 0.02]).limit_s == pytest.approx(84.0)
    assert patience.expecting(8.4).limit_s == pytest.approx(84.0), "before it has run a step that long"


@given(st.floats(1.0, 3600.0), SECONDS, st.lists(SECONDS, max_size=50))
def test_a_step_may_take_ten_times_the_longest_and_never_less_than_the_floor(
    floor_s: float, expected_s: float, durations_s: list[float]
) -> None:
    patience = after(Patience(floor_s=floor_s, expected_s=expected_s), durations_s)
    assert patience.longest_s == max([expected_s, *durations_s])
    assert patience.limit_s == max(floor_s, FACTOR * patience.longest_s)


@given(st.floats(1.0, 3600.0), st.lists(SECONDS, min_size=1, max_size=50), st.data())
def test_a_rank_that_hangs_is_named_before_the_replica_is_given_up(
    floor_s: float, durations_s: list[float], data: st.DataObject
) -> None:
    """Another rank begins to wait for it some time after the step began, at most after the longest step."""
    patience = after(Patience(floor_s=floor_s), durations_s)
    began_s = data.draw(st.floats(0.0, patience.longest_s))
    assert began_s + patience.rank_limit_s <= patience.limit_s * (1 + 1e-9)
    assert patience.rank_limit_s >= patience.limit_s - max(floor_s / FACTOR, patience.longest_s) * (1 + 1e-9)


def test_a_step_is_remembered_for_a_window_and_forgotten_after_two() -> None:
    patience = after(Patience(floor_s=1.0), [0.1] * 7 + [60.0])
    patience = after(patience, [0.1] * WINDOW_STEPS)
    assert patience.limit_s == 600.0
    patience = after(patience, [0.1] * WINDOW_STEPS)
    assert patience.limit_s == 1.0
    assert after(patience.expecting(5.0), [0.1] * 2 * WINDOW_STEPS).limit_s == 50.0, "what is expected stays"


@pytest.mark.parametrize(
    ("expected_s", "durations_s", "words"),
    [
        (0.0, [], "no step finished for 30 s"),
        (0.0, [0.41], "no step finished for 30 s, where the longest of late took 0.41 s"),
        (0.0, [8.4, 1.0], "no step finished for 84 s, where the longest of late took 8.4 s"),
        (5.0, [8.4], "no step finished for 84 s, where the longest of late took 8.4 s"),
        (5.0, [0.2], "no step finished for 50 s, where the longest was expected to take 5 s"),
        (0.0, [123.456], "no step finished for 1235 s, where the longest of late took 123 s"),
    ],
)
def test_the_loss_says_its_numbers(expected_s: float, durations_s: list[float], words: str) -> None:
    assert after(Patience(floor_s=30.0, expected_s=expected_s), durations_s).stall_words() == words
