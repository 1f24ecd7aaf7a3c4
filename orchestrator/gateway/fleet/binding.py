"""Keeps the requests that wait for a replica with room, and hands them on as they are bound."""

import asyncio
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.gateway.errors import QueueTimeout, ReplicaUnavailable
from placement.serving.routing.binding import Bindings, Waiting, WaitReason
from placement.serving.routing.choice import Route

_PAUSE = 3.0
"""The time that is left to everything else after a decision, as a multiple of what it took: with many replicas and many
requests that wait it takes milliseconds, and what changes meanwhile is decided upon together."""


@dataclass(slots=True, eq=False)
class _Waiter:
    request: Waiting
    route: asyncio.Future[Route]  # done once it is bound, or never will be


class BindingQueue:
    """Holds what waits, by rank. Lives on one event loop.

    Whoever comes while there is room is bound at once, without a turn of the loop.

    Args:
        decide: decides which of the requests, by rank, are bound, and notes those as the replicas' load. It raises
            ReplicaUnavailable where there is no replica, which then ends the wait of all.
    """

    def __init__(self, decide: Callable[[Sequence[Waiting]], Bindings]) -> None:
        self._decide = decide
        self._waiters: list[_Waiter] = []  # by rank
        self._reasons: Counter[WaitReason] = Counter()
        self._waking: asyncio.Handle | None = None
        self._open_s = 0.0  # loop time from which the next decision may be made

    def __len__(self) -> int:
        return len(self._waiters)

    def counts(self) -> Counter[WaitReason]:
        """Counts the requests that wait, by what they were last seen to wait for."""
        return Counter(self._reasons)

    async def take(self, request: Waiting, *, timeout_s: float | None = None) -> Route:
        """Waits until a request is bound.

        Raises:
            ReplicaUnavailable: there is no replica any more.
            QueueTimeout: no replica had room in time.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(request, loop.create_future())
        insort(self._waiters, waiter, key=lambda other: other.request.rank)
        timer: asyncio.Handle | None = None
        try:
            if len(self._waiters) == 1:
                self._run()
            else:
                self.wake()
            if not waiter.route.done() and timeout_s is not None:
                timer = loop.call_later(timeout_s, _expire, waiter)
            return await waiter.route
        finally:
            if timer is not None:
                timer.cancel()
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self.wake()  # those behind it may have room

    def wake(self) -> None:
        """Decides once more, soon: something has changed. Costs nothing while nobody waits."""
        if not self._waiters:
            self._reasons.clear()
        elif self._waking is None:
            loop = asyncio.get_running_loop()
            pause_s = self._open_s - loop.time()
            self._waking = loop.call_later(pause_s, self._run) if pause_s > 0 else loop.call_soon(self._run)

    def _run(self) -> None:
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self._decide_all()
        ended_s = loop.time()
        self._open_s = ended_s + _PAUSE * (ended_s - began_s)

    def _decide_all(self) -> None:
        waiting = [waiter for waiter in self._waiters if not waiter.route.done()]
        if not waiting:
            return
        try:
            bindings = self._decide([waiter.request for waiter in waiting])
        except ReplicaUnavailable as error:
            for waiter in waiting:
                waiter.route.set_exception(ReplicaUnavailable(str(error)))
            self._waiters.clear()
            self._reasons.clear()
            return
        self._reasons = bindings.counts()
        for waiter in waiting:
            route = bindings.bound.get(waiter.request.number)
            if route is not None:
                waiter.route.set_result(route)
                self._waiters.remove(waiter)


def _expire(waiter: _Waiter) -> None:
    if not waiter.route.done():
        waiter.route.set_exception(QueueTimeout("the deadline passed before a replica had room"))
