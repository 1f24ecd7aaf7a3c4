"""Decides where the requests of a simulation go: as the gateway does, by routing and binding."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from placement.planning.limits import ReplicaLimits
from placement.serving.routing.binding import Waiting, bind
from placement.serving.routing.choice import ReplicaLoad, Route
from placement.serving.routing.router import Router
from placement.serving.step_plan import StepPlan


class Dispatcher(Protocol):
    """Decides which of the requests that wait go to which replicas now.

    Attributes:
        limits: the sizes that all replicas serve within.
    """

    limits: ReplicaLimits

    def bind(self, waiting: Sequence[Waiting], loads: Sequence[ReplicaLoad]) -> Mapping[int, Route]:
        """Returns the routes of those that go now, by their numbers."""

    def stepped(self, replica: str, plan: StepPlan, seconds: float, answers: Sequence[int]) -> None:
        """Notes that a replica has run a step, and the lengths of the answers that ended with it."""

    def transferred(self, prefill: str, replica: str, *, num_tokens: int, num_bytes: int, exposed_s: float) -> None:
        """Notes that keys and values came, which held the first token up by ``exposed_s``."""

    def transfer_failed(self, prefill: str, replica: str) -> None:
        """Notes that keys and values did not come."""


class RouterDispatcher:
    """Decides as the gateway does, with its own router."""

    def __init__(self, router: Router, limits: ReplicaLimits) -> None:
        self._router = router
        self.limits = limits

    def bind(self, waiting: Sequence[Waiting], loads: Sequence[ReplicaLoad]) -> Mapping[int, Route]:
        """Returns the routes of those that go now, by their numbers."""
        num_tokens = sum(len(request.prompt.token_ids) for request in waiting)
        self._router.balance(loads, waiting_tokens=num_tokens, num_waiting=len(waiting))
        bound = bind(waiting, loads, self.limits, self._router.choose).bound
        for request in waiting:
            route = bound.get(request.number)
            if route is not None:
                self._router.sent(route, loads, request.prompt)
        return bound

    def stepped(self, replica: str, plan: StepPlan, seconds: float, answers: Sequence[int]) -> None:
        """Notes that a replica has run a step."""
        self._router.stepped(replica, plan.load, seconds, answers)

    def transferred(self, prefill: str, replica: str, *, num_tokens: int, num_bytes: int, exposed_s: float) -> None:
        """Notes that keys and values came."""
        self._router.transferred(prefill, replica, num_tokens=num_tokens, num_bytes=num_bytes, exposed_s=exposed_s)

    def transfer_failed(self, prefill: str, replica: str) -> None:
        """Notes that keys and values did not come."""
        self._router.transfer_failed(prefill, replica)


class OnlyReplica:
    """Sends every request at once to the only replica there is, which has a queue of its own."""

    def __init__(self, replica: str, limits: ReplicaLimits) -> None:
        self.limits = limits
        self._route = Route(replica=replica, reason="it is the only replica")

    def bind(self, waiting: Sequence[Waiting], loads: Sequence[ReplicaLoad]) -> Mapping[int, Route]:
        """Returns the one route for all."""
        return {request.number: self._route for request in waiting}

    def stepped(self, replica: str, plan: StepPlan, seconds: float, answers: Sequence[int]) -> None:
        """Learns nothing: there is nothing to choose."""

    def transferred(self, prefill: str, replica: str, *, num_tokens: int, num_bytes: int, exposed_s: float) -> None:
        """Learns nothing: nothing is sent."""

    def transfer_failed(self, prefill: str, replica: str) -> None:
        """Learns nothing: nothing is sent."""
