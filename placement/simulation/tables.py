"""Interpolates between measured points."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Reading(NamedTuple):
    """A value of a table.

    Attributes:
        is_measured: whether it lies within what was measured; False: it is extrapolated.
    """

    value: float
    is_measured: bool


class Table:
    """Holds values that were measured at points of one or more coordinates.

    It reads between two neighbours along the first coordinate, at each of them between two along the second, and so on:
    linearly, since that is how times grow. So the points need not be a grid; each may have neighbours of its own. Where
    all points agree in a coordinate, it does not matter. Beyond the outermost points the line through the last two goes
    on, but never below zero, and the reading says so.
    """

    __slots__ = ("_axis", "_parts", "_values")

    def __init__(self, points: Iterable[tuple[Sequence[float], float]]) -> None:
        """Takes the coordinates and the value of each point; there is at least one."""
        groups: dict[float, list[tuple[Sequence[float], float]]] = {}
        for at, value in points:
            groups.setdefault(at[0], []).append((at[1:], value))
        assert groups, "a table without points"
        self._axis = sorted(groups)
        is_last = not groups[self._axis[0]][0][0]
        self._values = [groups[at][-1][1] for at in self._axis] if is_last else []
        self._parts = [] if is_last else [Table(groups[at]) for at in self._axis]

    def read(self, *at: float) -> Reading:
        """Returns the value at a point."""
        axis, first = self._axis, at[0]
        if len(axis) == 1:
            return self._read(0, at[1:])
        upper = min(max(bisect_right(axis, first), 1), len(axis) - 1)
        left, right = axis[upper - 1], axis[upper]
        if first == left:
            return self._read(upper - 1, at[1:])
        if first == right:
            return self._read(upper, at[1:])
        low, low_measured = self._read(upper - 1, at[1:])
        high, high_measured = self._read(upper, at[1:])
        value = low + (high - low) * (first - left) / (right - left)
        is_within = left <= first <= right
        return Reading(value if is_within else max(0.0, value), is_within and low_measured and high_measured)

    def _read(self, index: int, rest: Sequence[float]) -> Reading:
        return self._parts[index].read(*rest) if self._parts else Reading(self._values[index], True)
