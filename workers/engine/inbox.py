"""Defines the messages in the engine's queue: other threads ask by them, and its own steps wake it by them."""

from dataclasses import dataclass

from workers.engine.types import Sink, Submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A message: a sequence that was admitted is to be computed.

    Attributes:
        at_s: when it was submitted, in seconds of a monotonic clock.
    """

    sink: Sink
    sequence_id: int
    submission: Submission
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """A message: nobody wants a sequence any more. It may have ended already."""

    sink: Sink
    sequence_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned:
    """A message: a sink is gone. What it submitted ends, and it is told nothing more."""

    sink: Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainAsked:
    """A message: the engine is to admit nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken:
    """A message that only wakes the loop: a step has ended, or the engine is to stop."""


Message = Submitted | Cancelled | Abandoned | DrainAsked | Woken
