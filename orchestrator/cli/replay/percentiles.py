"""Defines the percentile that all figures of a replay use."""

from collections.abc import Sequence


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Returns the percentile of sorted samples, at least one.

    It is interpolated linearly between the two samples beside rank ``percent / 100 * (n - 1)``, counted from 0. Numpy
    does so by default, and with it the scripts of the papers whose figures these are compared with.
    """
    rank = percent / 100 * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)
