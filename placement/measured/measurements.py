"""What the ranks of a stage measured of themselves and their links when they started, for people to see."""

from dataclasses import dataclass

from placement.measured.collectives import MeasuredSum
from placement.measured.exchange import MeasuredExchange
from placement.measured.overlap import MeasuredLanes


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMeasurements:
    """All of it: nothing of a stage of one rank.

    Attributes:
        sums: how they sum tensors, by size, ascending; none where they share sequences.
        lanes: steps in one lane and in two, by tokens, ascending; none where no step may be woven.
        exchange: where they share sequences.
    """

    sums: tuple[MeasuredSum, ...] = ()
    lanes: tuple[MeasuredLanes, ...] = ()
    exchange: MeasuredExchange | None = None


NOTHING_MEASURED = StageMeasurements()
