"""Holds what the ranks of a stage measured of themselves and their links when they started, to show it to people."""

from dataclasses import dataclass

from placement.measured.collectives import MeasuredSum
from placement.measured.exchange import MeasuredExchange
from placement.measured.overlap import MeasuredOverlap


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMeasurements:
    """The measurements of a stage. A stage of one rank has none.

    Attributes:
        sums: the all-reduce of each size, ascending; empty where the ranks share sequences.
        overlap: steps in one micro-batch and in two, by tokens, ascending; empty where no step may be overlapped.
        exchange: the exchange of ranks that share sequences; None elsewhere.
    """

    sums: tuple[MeasuredSum, ...] = ()
    overlap: tuple[MeasuredOverlap, ...] = ()
    exchange: MeasuredExchange | None = None


NOTHING_MEASURED = StageMeasurements()
