"""Tables give back what was measured, go straight between neighbours, and say when they extrapolate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.simulation.tables import Reading, Table

LINE = Table([((1.0,), 10.0), ((3.0,), 20.0), ((4.0,), 40.0)])


def test_a_measured_point_is_read_as_it_is() -> None:
    assert LINE.read(3.0) == Reading(20.0, True)


def test_between_two_points_the_line_is_straight() -> None:
    assert LINE.read(2.0) == Reading(15.0, True)


@pytest.mark.parametrize(("at", "value"), [(5.0, 60.0), (0.0, 5.0), (-9.0, 0.0)])
def test_beyond_the_points_the_last_line_goes_on_and_the_reading_says_so(at: float, value: float) -> None:
    assert LINE.read(at) == Reading(value, False)


def test_points_need_no_grid() -> None:
    table = Table([((0, 0), 0.0), ((0, 10), 10.0), ((2, 0), 0.0), ((2, 5), 20.0), ((2, 10), 30.0)])
    assert table.read(1, 5) == Reading(12.5, True)
    assert table.read(2, 7.5) == Reading(25.0, True)


def test_a_coordinate_in_which_all_agree_does_not_matter() -> None:
    assert Table([((0, 7), 1.0), ((2, 7), 3.0)]).read(1, 99) == Reading(2.0, True)


def test_one_coordinate_beyond_the_points_is_enough_to_say_so() -> None:
    table = Table([((a, b), float(a * b)) for a in (1, 2) for b in (1, 2)])
    assert table.read(1.5, 1.5).is_measured and not table.read(1.5, 2.5).is_measured


@given(st.tuples(*[st.floats(0, 10)] * 3), st.tuples(*[st.floats(-5, 5)] * 3))
def test_linear_times_are_read_exactly(at: tuple[float, ...], slopes: tuple[float, ...]) -> None:
    def time_of(*where: float) -> float:
        return 200.0 + sum(x * slope for x, slope in zip(where, slopes, strict=True))

    table = Table([((a, b, c), time_of(a, b, c)) for a in (0, 3, 10) for b in (0, 7, 10) for c in (0, 10)])
    reading = table.read(*at)
    assert reading.is_measured and reading.value == pytest.approx(time_of(*at))
