"""Defines the messages in the engine's queue: other threads ask by them, and its own steps wake it by them."""

from dataclasses import dataclass

from workers.engine.types import KvTransfer, Sink, Submission


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
class KvCame:
    """A message: the keys and values of a prompt came from another replica, or will not come.

    Attributes:
        hold_id: the one of the command that asked for them.
        transfer_id: the transfer's name; empty where it was not begun.
        num_tokens: the leading tokens of the sequence whose keys and values are here; 0 where none came.
    """

    hold_id: int
    transfer_id: bytes
    num_tokens: int
    transfer: KvTransfer


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTaken:
    """A message: another replica has all keys and values of a sequence, or its lease is over.

    Attributes:
        lapsed: whether the lease is over.
    """

    sink: Sink
    sequence_id: int
    lapsed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Observing:
    """A message: from now on a sink is told of every step, until it is gone."""

    sink: Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken:
    """A message that only wakes the loop: a step has ended, or the engine is to stop."""


Message = Submitted | Cancelled | Abandoned | DrainAsked | KvCame | KvTaken | Observing | Woken
