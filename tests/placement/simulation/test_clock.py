"""What is due is done in order, and time passes for nothing else."""

from functools import partial

import pytest

from placement.simulation.clock import VirtualClock


def test_things_are_done_in_order_of_time_and_then_of_making() -> None:
    clock, done = VirtualClock(), list[str]()
    for when_s, name in ((2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")):
        clock.at(when_s, partial(done.append, name))
    clock.run()
    assert done == ["a", "b", "c", "d"] and clock.now_s == 2.0 and clock.num_actions == 4


def test_what_an_action_brings_about_is_done_too_unless_it_comes_too_late() -> None:
    clock, times = VirtualClock(), list[float]()

    def again() -> None:
        times.append(clock.now_s)
        clock.after(1.0, again)

    clock.at(0.5, again)
    clock.run(until_s=3.0)
    assert times == [0.5, 1.5, 2.5]


def test_nothing_is_due_in_the_past() -> None:
    clock = VirtualClock()
    clock.at(1.0, lambda: None)
    clock.run()
    with pytest.raises(AssertionError):
        clock.at(0.5, lambda: None)
