"""Transfers share the connections of nodes fairly, and lose nothing."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.simulation.clock import VirtualClock
from placement.simulation.network import Interface, Network

FAST = Interface(send_bytes_per_s=100.0, receive_bytes_per_s=100.0)
SLOW = Interface(send_bytes_per_s=10.0, receive_bytes_per_s=10.0)


def arrivals(sends: list[tuple[float, str, str, float]], *, contends: bool = True) -> list[float]:
    """Returns when each of (time, source, target, bytes) has come; ``s`` has a slow connection."""
    clock = VirtualClock()
    interfaces = {"a": FAST, "b": FAST, "c": FAST, "s": SLOW}
    network = Network(clock, interfaces, latency_s=0.5, contends=contends)
    came = [-1.0] * len(sends)

    def arrived(index: int) -> None:
        came[index] = clock.now_s

    for index, (at_s, source, target, num_bytes) in enumerate(sends):
        clock.at(at_s, partial(network.send, source, target, num_bytes, partial(arrived, index)))
    clock.run()
    return came


def test_one_transfer_has_the_whole_connection() -> None:
    assert arrivals([(1.0, "a", "b", 200.0)]) == pytest.approx([3.5])


def test_two_from_one_node_share_it_and_the_longer_goes_on_alone() -> None:
    assert arrivals([(0.0, "a", "b", 100.0), (0.0, "a", "c", 300.0)]) == pytest.approx([2.5, 4.5])


def test_what_a_slow_connection_leaves_goes_to_others() -> None:
    assert arrivals([(0.0, "a", "s", 100.0), (0.0, "a", "b", 90.0)]) == pytest.approx([10.5, 1.5])


def test_both_directions_are_independent() -> None:
    assert arrivals([(0.0, "a", "b", 100.0), (0.0, "b", "a", 100.0)]) == pytest.approx([1.5, 1.5])


def test_without_contention_each_has_the_whole_speed() -> None:
    sends = [(0.0, "a", "b", 100.0)] * 3
    assert arrivals(sends, contends=False) == pytest.approx([1.5] * 3)
    assert arrivals(sends) == pytest.approx([3.5] * 3)


def test_nothing_and_what_stays_takes_no_share() -> None:
    assert arrivals([(0.0, "a", "b", 0.0), (0.0, "a", "a", 100.0)]) == pytest.approx([0.5, 0.0])


SENDS = st.lists(
    st.tuples(st.floats(0.0, 5.0), st.sampled_from("abcs"), st.sampled_from("abcs"), st.floats(0.0, 500.0)),
    max_size=12,
)


@given(SENDS)
def test_everything_comes_no_sooner_than_alone_and_no_later_than_one_by_one(
    sends: list[tuple[float, str, str, float]],
) -> None:
    together = arrivals(sends)
    alone = [arrivals([send])[0] for send in sends]
    last_s = 5.0 + sum(num_bytes / 10.0 for _, _, _, num_bytes in sends) + 0.5
    for came, soonest in zip(together, alone, strict=True):
        assert soonest - 1e-6 <= came <= last_s + 1e-6


@given(SENDS)
def test_no_connection_carries_more_than_it_can(sends: list[tuple[float, str, str, float]]) -> None:
    together = arrivals(sends)
    for node, speed in (("a", 100.0), ("b", 100.0), ("c", 100.0), ("s", 10.0)):
        sent = [(send, came) for send, came in zip(sends, together, strict=True) if send[1] == node != send[2]]
        if sent:
            first_s, last_s = min(send[0] for send, _ in sent), max(came for _, came in sent)
            assert sum(send[3] for send, _ in sent) <= speed * (last_s - first_s - 0.5) + 1e-3
