"""Decides how many requests are served at once, and which of the others wait.

A request that cannot be served soon is refused at once with a hint when to come back. This bounds the latency of the
accepted ones under any load.
"""

import asyncio
from bisect import insort
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from orchestrator.gateway.errors import Draining, Overloaded, QueueTimeout
from placement.errors import InvalidConfig

MIN_RETRY_S, MAX_RETRY_S = 1.0, 30.0


@dataclass(slots=True, eq=False)
class _Waiter:
    rank: tuple[int, int]  # -priority, arrival
    weight: int  # slots that it needs
    given: asyncio.Future[None]  # done once it has a slot, or never will


class Admission:
    """Hands out slots for requests in flight, with a bounded queue. Lives on one event loop.

    Slots that are given back pass straight to the head of the queue, so that no newcomer can take them in between.
    While anybody waits, fewer slots are free than the head of the queue needs: nobody overtakes it, however many it
    needs.
    """

    def __init__(self, max_in_flight: int, max_queued: int) -> None:
        for name, value, least in (("max_in_flight", max_in_flight, 1), ("max_queued", max_queued, 0)):
            if value < least:
                raise InvalidConfig(
                    field=f"gateway.{name}", value=value, problem=f"must be at least {least}", fix="Raise it."
                )
        self.max_in_flight = max_in_flight
        self.max_queued = max_queued
        self._in_flight = 0
        self._queue: list[_Waiter] = []  # by rank
        self._num_arrivals = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_handover_s: float | None = None  # loop time; None while nobody waits
        self._handover_interval_s = MIN_RETRY_S  # moving average, under load

    @property
    def in_flight(self) -> int:
        """Counts the slots that are held."""
        return self._in_flight

    @property
    def queued(self) -> int:
        """Counts the requests that wait."""
        return sum(not waiter.given.done() for waiter in self._queue)

    @property
    def draining(self) -> bool:
        """Says whether new requests are refused for good."""
        return self._draining

    @asynccontextmanager
    async def slot(self, *, priority: int = 0, timeout_s: float | None = None, weight: int = 1) -> AsyncIterator[None]:
        """Holds ``weight`` slots for the length of the block. Waits and raises as ``acquire`` does."""
        await self.acquire(priority=priority, timeout_s=timeout_s, weight=weight)
        try:
            yield
        finally:
            self.release(weight)

    async def acquire(self, *, priority: int = 0, timeout_s: float | None = None, weight: int = 1) -> None:
        """Takes ``weight`` slots, which ``release`` gives back. Waits by priority, then in order of arrival.

        Args:
            timeout_s: the longest wait; without it the wait has no end.
            weight: from 1 to ``max_in_flight``.

        Raises:
            Draining: nothing new is taken any more.
            Overloaded: too few slots are free and the queue is full; raised at once.
            QueueTimeout: too few slots came free in time.
        """
        assert 1 <= weight <= self.max_in_flight, weight
        if self._draining:
            raise Draining("the service is stopping")
        num_queued = self.queued
        if not num_queued and self._in_flight + weight <= self.max_in_flight:
            self._take(weight)
            return
        if num_queued >= self.max_queued:
            raise Overloaded(self._retry_after_s())
        loop = asyncio.get_running_loop()
        waiter = _Waiter((-priority, self._num_arrivals), weight, loop.create_future())
        self._num_arrivals += 1
        insort(self._queue, waiter, key=lambda other: other.rank)
        timer = None if timeout_s is None else loop.call_later(timeout_s, _expire, waiter)
        try:
            await waiter.given
        except asyncio.CancelledError:
            # The slots may have been given in the very iteration of the loop in which the task was cancelled.
            if waiter.given.done() and not waiter.given.cancelled() and waiter.given.exception() is None:
                self.release(weight)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if waiter in self._queue:
                self._queue.remove(waiter)
                self._hand_out()  # those behind it may need fewer

    def release(self, weight: int = 1) -> None:
        """Gives ``weight`` slots to the first that still wait, or back."""
        self._in_flight -= weight
        self._hand_out()
        if not self._in_flight:
            self._idle.set()

    def start_drain(self) -> None:
        """Refuses what comes from now on. What is in flight or queued goes on."""
        self._draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until nothing is in flight or queued; returns False when that takes longer than ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._in_flight:
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _take(self, weight: int) -> None:
        self._in_flight += weight
        self._idle.clear()

    def _hand_out(self) -> None:
        while self._queue:
            waiter = self._queue[0]
            if not waiter.given.done():
                if self._in_flight + waiter.weight > self.max_in_flight:
                    return
                self._take(waiter.weight)
                waiter.given.set_result(None)
                self._note_handover()
            self._queue.pop(0)
        self._last_handover_s = None

    def _note_handover(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._last_handover_s is not None:
            self._handover_interval_s += 0.1 * (now_s - self._last_handover_s - self._handover_interval_s)
        self._last_handover_s = now_s

    def _retry_after_s(self) -> float:
        return min(max(self._handover_interval_s * self.queued, MIN_RETRY_S), MAX_RETRY_S)


def _expire(waiter: _Waiter) -> None:
    if not waiter.given.done():
        waiter.given.set_exception(QueueTimeout("the deadline passed before a slot came free"))
