"""Checks that shares stay within memory."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.measured.speed import DeviceSpeed, shares_by_speed
from placement.planning.room import fill, fit

RATES = st.floats(1e-3, 1e3)
# Weight, what does not scale with the share, and memory, of each device.
DEVICES = st.lists(st.tuples(RATES, st.floats(0, 0.2), st.floats(0.3, 2.0)), min_size=1, max_size=6)


@given(st.lists(st.tuples(RATES, st.floats(0, 1e3) | st.just(math.inf)), min_size=1, max_size=8), RATES)
def test_what_is_dealt_is_all_within_caps_and_balanced(devices: list[tuple[float, float]], total: float) -> None:
    weights, caps = [weight for weight, _ in devices], [cap for _, cap in devices]
    dealt = fill(weights, caps, total)
    if dealt is None:
        assert sum(caps) < total
        return
    assert sum(dealt) == pytest.approx(total)
    assert all(0 <= share <= cap * (1 + 1e-9) for share, cap in zip(dealt, caps, strict=True))
    quotients = [share / weight for share, weight in zip(dealt, weights, strict=True)]
    most = max(quotients)
    for share, cap, quotient in zip(dealt, caps, quotients, strict=True):
        assert share == pytest.approx(cap) or quotient == pytest.approx(most), "only what is full has less to do"


@given(DEVICES)
def test_shares_fit_wherever_there_is_room_to_spare(devices: list[tuple[float, float, float]]) -> None:
    """The model has size 1, whatever the scale of the weights."""
    weights = [weight for weight, _, _ in devices]
    total = sum(weights)

    def fullness(tried: list[float] | tuple[float, ...]) -> list[float]:
        return [(fixed + share / total) / memory for share, (_, fixed, memory) in zip(tried, devices, strict=True)]

    found = fit(weights, fullness)  # type: ignore[arg-type]
    assert sum(found) == pytest.approx(total)
    if max(fullness(weights)) <= 1:
        assert found == tuple(weights)
    elif sum(memory - fixed for _, fixed, memory in devices) > 1.1:
        assert max(fullness(found)) <= 1


def test_units_that_move_only_together_are_passed() -> None:
    """With eight units, a lower share changes nothing until one of them moves to another device."""

    def fullness(tried: object) -> list[float]:
        assert isinstance(tried, tuple)
        units = round(8 * tried[0] / sum(tried))
        return [units / 5, (8 - units) / 8]

    assert round(8 * fit((7, 1), fullness)[0] / 8) == 5


def test_shares_are_by_how_fast_weights_are_read() -> None:
    fast = DeviceSpeed(weight_bytes_per_s=3e10, flops_per_s=1e11)
    slow = DeviceSpeed(weight_bytes_per_s=1e10, flops_per_s=9e11)
    assert shares_by_speed([fast, slow]) == (3e10, 1e10)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_what_no_device_can_do_is_no_speed(rate: float) -> None:
    with pytest.raises(AssertionError):
        DeviceSpeed(weight_bytes_per_s=rate, flops_per_s=1.0)
