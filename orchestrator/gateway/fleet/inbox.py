"""Keeps what replicas say of a request until its task takes it, and decides when tasks are woken.

To send a message to a client costs more than everything else that is done for a token. Tasks are therefore woken in
rounds, and the next round waits for half as long as the last one took, 50 ms at most. With few requests that is over
long before the next step comes, and no token waits. Under load, steps are read in the meantime, and each message to a
client carries the tokens of several.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from placement.errors import HeterodyneError
from protos.heterodyne.worker.v1 import worker_pb2

# The share of time that is left to reading, as a multiple of a round, which includes whatever else was due on the loop;
# the most of it; and what is too short to be worth a timer.
_PAUSE = 0.5
_MOST_PAUSE_S = 0.05
_LEAST_PAUSE_S = 0.0005
# Events of a choice that wait while nothing can be written to the client. Each is a token, and some 100 bytes.
MAX_WAITING = 8192


class Loss(StrEnum):
    """Kinds of causes for which the gateway gives a replica up: what it saw first."""

    RANK_FAILED = "rank_failed"
    """The controller says so first: a process ended, or a node was lost."""
    STREAM_BROKEN = "stream_broken"
    """The connection to its leader ended, mostly because the leader's process did."""
    ENGINE_FAILED = "engine_failed"
    """Its leader says that a step failed."""
    NO_HEARTBEAT = "no_heartbeat"
    """Nothing was heard of its leader."""
    STALLED = "stalled"
    """It has sequences to compute, and finished no step."""
    STOPPED = "stopped"
    """It, or the whole service, was told to stop. That is no fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Says that the replica is gone; its sequences end here."""

    cause: str
    kind: Loss = Loss.STREAM_BROKEN


# Of a sequence; or what ends all sequences of a request: the replica is lost, or the gateway gives the request up.
SequenceEvent = worker_pb2.SequenceOutput | worker_pb2.Rejected | Lost | HeterodyneError


class Inbox:
    """Keeps the events of one request in order, at most ``limit``. It has one event loop and one reader.

    Where more events come, the reader is too slow: nothing is kept from then on, and the request is to be ended.

    Args:
        limit: ``MAX_WAITING`` for each choice of the request: 40 s of an answer of 200 tokens a second, beyond what the
            buffers of the connection hold.

    Attributes:
        full: whether more events came.
        on_full: is called once, when that happens. It must raise nothing.
    """

    def __init__(self, *, limit: int = MAX_WAITING) -> None:
        self.full = False
        self.on_full: Callable[[], None] = _nothing
        self._limit = limit
        self._events: list[SequenceEvent] = []
        self._woken = False
        self._waiting: asyncio.Future[None] | None = None

    def put(self, event: SequenceEvent) -> None:
        """Keeps an event until the reader is woken; drops it where it is one too many."""
        if not self.full and len(self._events) >= self._limit:
            self.full = True
            self.on_full()
        if not self.full:
            self._events.append(event)

    def silence(self) -> None:
        """Stops ``on_full`` from being called."""
        self.on_full = _nothing

    def wake(self) -> None:
        """Makes the reader take what is there: now if it waits, or as soon as it comes back."""
        self._woken = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def put_now(self, event: SequenceEvent) -> None:
        """Keeps an event that ends the request, whatever the limit, and wakes the reader."""
        self._events.append(event)
        self.wake()

    async def take(self) -> list[SequenceEvent]:
        """Waits to be woken; returns all events there are."""
        if not self._woken:
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        self._woken = False
        events, self._events = self._events, []
        return events


def _nothing() -> None:
    pass


class Rounds:
    """Wakes the readers of inboxes that got something, together. Lives on the event loop it is made on."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._inboxes: set[Inbox] = set()
        self._open_s = 0.0  # loop time from which a round may begin
        self._timer: asyncio.TimerHandle | None = None

    def wake(self, inboxes: Iterable[Inbox]) -> None:
        """Wakes the readers of ``inboxes``, now or when the pause is over."""
        self._inboxes.update(inboxes)
        pause_s = self._open_s - self._loop.time()
        if pause_s < _LEAST_PAUSE_S:
            self._begin()
        elif self._timer is None:
            self._timer = self._loop.call_later(pause_s, self._begin)

    def _begin(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for inbox in self._inboxes:
            inbox.wake()
        self._inboxes.clear()
        # The loop runs callbacks in order: this one after every reader just woken has passed on what it had.
        self._loop.call_soon(self._end, self._loop.time())

    def _end(self, begun_s: float) -> None:
        now_s = self._loop.time()
        self._open_s = now_s + min(_PAUSE * (now_s - begun_s), _MOST_PAUSE_S)
