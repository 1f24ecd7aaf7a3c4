"""What other threads ask of the engine, and what its own steps tell it, as messages in one queue."""

from dataclasses import dataclass

from workers.engine.types import Sink, Submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A sequence that was admitted."""

    sink: Sink
    sequence_id: int
    submission: Submission
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """A sequence that nobody wants any more; it may have ended already."""

    sink: Sink
    sequence_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned:
    """A sink that is gone: what was submitted through it ends, and it is told nothing more."""

    sink: Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainAsked:
    """The engine is to admit nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken:
    """Something else changed: a step has ended, or the engine is to stop."""


Message = Submitted | Cancelled | Abandoned | DrainAsked | Woken
