"""Follows a deployment through the controller's stream: until it serves, and then until nothing is left that serves."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from orchestrator.deployment import events
from orchestrator.deployment.gateway_process import GatewayProcess
from orchestrator.deployment.load_progress import LoadProgress
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.errors import LaunchFailed, ServiceEnded
from orchestrator.event_log import EventLog
from protos.heterodyne.control.v1 import control_pb2, control_pb2_grpc

_POLL_S = 0.2
# A gateway that serves nothing for so long after the controller was lost has no workers any more.
_ALONE_S = 10.0
_ENDED = (control_pb2.PHASE_FAILED, control_pb2.PHASE_STOPPED)
# The controller is reached directly, whatever proxy the environment names.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


class ControllerLost(Exception):
    """The controller's stream ended. Raised once, after the last state."""


States = Callable[[], control_pb2.WatchResponse | None]


@contextmanager
def watch(control_address: str) -> Iterator[States]:
    """Reads the controller's stream in a thread.

    Yields a function that returns the next state, or None after a while without one; it raises ControllerLost.
    """
    states: queue.Queue[control_pb2.WatchResponse | ControllerLost] = queue.Queue()
    with grpc.insecure_channel(control_address, options=_CHANNEL_OPTIONS) as channel:
        call = control_pb2_grpc.ControlStub(channel).Watch(control_pb2.WatchRequest())

        def read() -> None:
            cause = "it ended its stream"
            try:
                for state in call:
                    states.put(state)
            except grpc.RpcError as error:
                cause = error.code().name
            states.put(ControllerLost(cause))

        def take() -> control_pb2.WatchResponse | None:
            try:
                state = states.get(timeout=_POLL_S)
            except queue.Empty:
                return None
            if isinstance(state, ControllerLost):
                raise state
            return state

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            yield take
        finally:
            call.cancel()
            thread.join(timeout=2.0)


def follow_launch(
    states: States, gateway: GatewayProcess, stop: StopRequest, progress: LoadProgress, *, timeout_s: float
) -> control_pb2.WatchResponse | None:
    """Waits until a request would be served. Returns the deployment as it is then; None when asked to stop before.

    Raises:
        LaunchFailed: the first failing rank's cause; the controller or the gateway was lost; or ``timeout_s`` passed.
    """
    deadline = time.monotonic() + timeout_s
    ready: control_pb2.WatchResponse | None = None
    while not stop.asked.is_set():
        try:
            state = states()
        except ControllerLost as lost:
            raise LaunchFailed(f"the controller was lost while the deployment started ({lost})") from None
        progress.tick()
        if gateway.ended():
            raise LaunchFailed(gateway.why_ended())
        if time.monotonic() > deadline:
            raise LaunchFailed(f"the deployment was not ready after {timeout_s:g} s")
        if state is not None:
            progress.update(state)
            if state.phase == control_pb2.PHASE_FAILED:
                raise LaunchFailed(state.cause)
            ready = state if state.phase == control_pb2.PHASE_READY else None
        if ready is not None and gateway.serves():
            return ready
    return None


def supervise(
    state: control_pb2.WatchResponse | None, states: States, gateway: GatewayProcess, stop: StopRequest, log: EventLog
) -> str | None:
    """Says what changes until asked to stop.

    A controller that is lost takes its workers with it, unless only the connection to it broke: then they serve on.

    Args:
        state: the deployment as it is now.

    Returns:
        Why the last replica was lost, once none is left; None where it was asked to stop.

    Raises:
        ServiceEnded: the gateway ended by itself.
    """
    phases: dict[tuple[str, int], int] = {}
    alone: _Alone | None = None
    while not stop.asked.is_set():
        if state is not None:
            _tell_changes(phases, state, log)
            if state.replicas and all(replica.phase in _ENDED for replica in state.replicas):
                return next((replica.cause for replica in reversed(state.replicas) if replica.cause), state.cause)
        if gateway.ended():
            raise ServiceEnded(gateway.why_ended())
        if alone is not None and alone.is_over(gateway):
            return f"the controller was lost ({alone.cause}), and no replica answers any more"
        try:
            state = states()
        except ControllerLost as lost:
            log.tell(events.controller_lost(lost))
            alone, state = _Alone(cause=str(lost)), None
    return None


def _tell_changes(phases: dict[tuple[str, int], int], state: control_pb2.WatchResponse, log: EventLog) -> None:
    """Says which replicas, or attention workers, are in another phase than in ``phases``, and keeps the new ones."""
    for replica in (*([state.attention] if state.HasField("attention") else ()), *state.replicas):
        key = (replica.name, replica.epoch)
        if phases.get(key, control_pb2.PHASE_READY) != replica.phase:
            log.tell(events.replica_changed(replica))
        phases[key] = replica.phase


@dataclass(slots=True, kw_only=True)
class _Alone:
    """How the gateway fares since the controller was lost. ``served_s``: when it last served, by the clock."""

    cause: str
    served_s: float = field(default_factory=time.monotonic)

    def is_over(self, gateway: GatewayProcess) -> bool:
        """Returns whether the gateway has served nothing for so long that it will not again."""
        if gateway.serves():
            self.served_s = time.monotonic()
        return time.monotonic() - self.served_s > _ALONE_S
