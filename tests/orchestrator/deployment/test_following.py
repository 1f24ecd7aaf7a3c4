"""How ``serve`` follows the launch: what it says when the controller, or time, is lost."""

import io
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, cast

import grpc
import pytest
from rich.console import Console

from orchestrator.deployment import following
from orchestrator.deployment.gateway_process import GatewayProcess
from orchestrator.deployment.load_progress import LoadProgress
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.errors import LaunchFailed, ServiceEnded
from orchestrator.event_log import EventLog
from protos.heterodyne.control.v1 import control_pb2, control_pb2_grpc
from tests.support.clocks import PATIENCE_S

READY, FAILED = control_pb2.PHASE_READY, control_pb2.PHASE_FAILED


@dataclass
class Controller(control_pb2_grpc.ControlServicer):
    """Streams what it is given; the stream ends when ``end`` is set."""

    states: list[control_pb2.WatchResponse] = field(default_factory=list)
    end: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def Watch(self, request: control_pb2.WatchRequest, context: Any) -> Iterator[control_pb2.WatchResponse]:
        yield from self.states
        self.end.wait(PATIENCE_S)


@pytest.fixture
def controller() -> Iterator[Controller]:
    controller = Controller()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    control_pb2_grpc.add_ControlServicer_to_server(controller, server)
    controller.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield controller
    controller.end.set()
    server.stop(None).wait()


class RunningGateway:
    """A gateway that does not end; ``looked`` counts how often that was checked, ``asked`` how often it was asked."""

    looked = 0
    asked = 0

    def __init__(self, *, serves_after: int = 0) -> None:
        self._serves_after = serves_after

    def serves(self) -> bool:
        self.asked += 1
        return self.asked > self._serves_after

    def ended(self) -> bool:
        self.looked += 1
        return False

    def why_ended(self) -> str:
        return "the gateway was killed by SIGSEGV"


def launch(controller: Controller, *, timeout_s: float = PATIENCE_S, running: RunningGateway | None = None) -> Any:
    gateway = cast(GatewayProcess, running or RunningGateway())
    log = EventLog(Console(file=io.StringIO()))
    with following.watch(controller.address) as states, LoadProgress(log) as progress:
        return following.follow_launch(states, gateway, StopRequest(), progress, timeout_s=timeout_s)


def test_launch_ends_when_everything_is_ready(controller: Controller) -> None:
    controller.states = [control_pb2.WatchResponse(phase=phase) for phase in (control_pb2.PHASE_LOADING, READY)]
    assert launch(controller)


def test_launch_fails_with_the_first_cause(controller: Controller) -> None:
    controller.states = [control_pb2.WatchResponse(phase=control_pb2.PHASE_FAILED, cause="rank 0: no memory")]
    with pytest.raises(LaunchFailed, match="rank 0: no memory"):
        launch(controller)


def test_launch_fails_when_the_controller_is_lost(controller: Controller) -> None:
    controller.states = [control_pb2.WatchResponse(phase=control_pb2.PHASE_LOADING)]
    controller.end.set()
    with pytest.raises(LaunchFailed, match="the controller was lost while the deployment started"):
        launch(controller)


def test_launch_has_a_limit(controller: Controller) -> None:
    with pytest.raises(LaunchFailed, match=r"was not ready after 0\.3 s"):
        launch(controller, timeout_s=0.3)


def test_the_controller_is_reached_past_any_proxy(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    controller.states = [control_pb2.WatchResponse(phase=READY)]
    assert launch(controller)


def test_a_deployment_is_ready_once_its_gateway_serves(controller: Controller) -> None:
    controller.states = [control_pb2.WatchResponse(phase=READY)]
    gateway = RunningGateway(serves_after=3)
    assert launch(controller, running=gateway)
    assert gateway.asked == 4
    with pytest.raises(LaunchFailed, match=r"was not ready after 0\.5 s"):
        launch(controller, running=RunningGateway(serves_after=10**9), timeout_s=0.5)


def test_a_gateway_that_ends_is_quoted_before_and_after_the_start(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunningGateway, "ended", lambda _: True)
    with pytest.raises(LaunchFailed, match="was killed by SIGSEGV"):
        launch(controller)
    with pytest.raises(ServiceEnded, match="was killed by SIGSEGV"):
        supervise(controller, RunningGateway(), io.StringIO())


def replicas(*phases: "control_pb2.Phase.ValueType") -> control_pb2.WatchResponse:
    """A deployment that was ready once, with replicas in these phases."""
    each = [
        control_pb2.Replica(name=f"replica-{at}", phase=phase, cause="" if phase == READY else f"no {at}")
        for at, phase in enumerate(phases)
    ]
    return control_pb2.WatchResponse(phase=READY, replicas=each)


def supervise(
    controller: Controller,
    gateway: RunningGateway,
    out: io.StringIO,
    *,
    at_first: control_pb2.WatchResponse | None = None,
    stop: StopRequest | None = None,
) -> str | None:
    log = EventLog(Console(file=out, width=200))
    with following.watch(controller.address) as states:
        return following.supervise(at_first, states, cast(GatewayProcess, gateway), stop or StopRequest(), log)


def test_it_ends_once_no_replica_is_left(controller: Controller) -> None:
    controller.states = [replicas(READY, READY), replicas(READY, FAILED), replicas(FAILED, FAILED)]
    out = io.StringIO()
    assert supervise(controller, RunningGateway(), out) == "no 1"
    assert out.getvalue().count("phase=failed") == 2


def test_a_replica_that_was_lost_before_the_gateway_served_is_told_of_too(controller: Controller) -> None:
    controller.states = [replicas(READY, FAILED)]
    at_first = launch(controller)
    controller.states = [replicas(FAILED, FAILED)]
    out = io.StringIO()
    assert supervise(controller, RunningGateway(), out, at_first=at_first) == "no 1"
    assert [line.split("replica=")[1].split()[0] for line in out.getvalue().splitlines()] == ["replica-1", "replica-0"]


def test_serving_goes_on_without_the_controller_which_is_said_once(controller: Controller) -> None:
    controller.end.set()
    out, gateway, stop = io.StringIO(), RunningGateway(), StopRequest()

    def stop_later() -> None:
        while "event=controller_lost" not in out.getvalue():
            time.sleep(0.05)
        looked = gateway.looked
        while gateway.looked < looked + 5:
            time.sleep(0.05)
        stop.asked.set()

    threading.Thread(target=stop_later, daemon=True).start()
    assert supervise(controller, gateway, out, stop=stop) is None
    assert out.getvalue().count("event=controller_lost") == 1


def test_a_gateway_that_serves_nothing_once_the_controller_is_lost_is_the_end(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_ALONE_S", 0.5)
    controller.end.set()
    cause = supervise(controller, RunningGateway(serves_after=10**9), io.StringIO())
    assert cause is not None and "the controller was lost" in cause and "no replica answers any more" in cause
