"""Runs one deployment for ``serve``, from preflight to the end of the last process.

This process is the Ray driver and the parent of the gateway. The order of starting is controller, gateway, workers;
of stopping gateway (drained), workers, Ray. Whatever fails first is the message that the user sees.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console

from orchestrator.config.document import Config, load_config
from orchestrator.controller.actor import ControllerFailed, ControllerHandle, Speeds
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.deployment.auto_split import settle
from orchestrator.deployment.gateway_process import GatewayProcess, gateway_process
from orchestrator.deployment.load_progress import LoadProgress
from orchestrator.deployment.plan_lines import plan_lines
from orchestrator.deployment.preflight import Checked, on_hosts, preflight
from orchestrator.deployment.seats import find_seats, rank_labels, worker_needs
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.errors import LaunchFailed, ServiceEnded
from orchestrator.key_values import key_values
from orchestrator.launcher.cluster import LaunchSettings, check_resources, connect, disconnect
from orchestrator.launcher.ray_access import lets_in_anybody
from protos.heterodyne.control.v1 import control_pb2, control_pb2_grpc

_POLL_S = 0.2
# Beyond the limits of the launch's own steps, whose causes say more.
_LAUNCH_SLACK_S = 30.0
# The controller is reached directly, whatever proxy the environment names.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


def serve(path: Path, *, overrides: Sequence[str], console: Console) -> int:
    """Serves until stopped. Returns 0 when every accepted request finished, 1 when the drain had to be cut.

    Raises:
        HeterodyneError: a mistake in the input, before anything was started; a launch that failed; or a part
            that ended by itself.
    """
    config = load_config(path, overrides=overrides)
    checked = preflight(config)
    stop = StopRequest()
    stop.install()
    address = config.cluster.ray_address or "local"
    needs = worker_needs(checked)
    num_cpus, num_gpus = sum(need.num_cpus for need in needs), sum(need.num_gpus for need in needs)
    if checked.split_by is None and config.cluster.is_local:
        _print(console, plan_lines(checked))
    _say(console, event="connect", ray_address=address)
    connect(address, num_cpus=num_cpus)
    try:
        stop.install()
        _warn_of_strangers(address, console)
        most_cpus = max(need.num_cpus for need in needs)
        check_resources(num_cpus=num_cpus, num_gpus=num_gpus, most_cpus=most_cpus)
        if not config.cluster.is_local:
            hosts = find_seats(needs, stop.asked)
            if hosts is None:
                _say(console, event="hosts", cause="no room for all workers was found; Ray places them")
            else:
                checked = on_hosts(checked, hosts)
            _print(console, plan_lines(checked) if checked.split_by is None else ())
        with (
            _controller(checked, stop, console) as launched,
            gateway_process(path, overrides, launched.checked, launched.control_address, stop) as gateway,
        ):
            return _run(config, launched.control_address, gateway, stop, console)
    finally:
        disconnect()
        stop.ignore()


def _warn_of_strangers(ray_address: str, console: Console) -> None:
    """Says so where the Ray that was joined has no authentication; one that was started here has."""
    if lets_in_anybody():
        _say(
            console,
            event="ray_without_authentication",
            ray_address=ray_address,
            risk="whoever reaches this cluster runs code on it",
            fix="start its nodes and serve with RAY_AUTH_MODE=token and the token of `ray get-auth-token --generate`",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    """The deployment that is being launched, and where its course can be watched."""

    checked: Checked
    control_address: str


@contextmanager
def _controller(checked: Checked, stop: StopRequest, console: Console) -> Iterator[_Launched]:
    """Starts a controller, measures the workers where ``auto`` cuts the model, and begins the launch."""
    config = checked.config
    handle = ControllerHandle(
        LaunchSettings(
            bind_host=config.cluster.bind_host,
            start_timeout_s=config.launch.start_timeout_s,
            labels=rank_labels(checked),
        )
    )
    try:
        if checked.split_by is not None:
            _say(console, event="measure", workers=len(checked.workers))
            settled = settle(checked, _measure(handle, checked, stop))
            checked = settled.checked
            _print(console, [settled.line, *plan_lines(checked)])
        yield _Launched(checked=checked, control_address=handle.start(_settings(checked)))
    finally:
        handle.stop()


def _measure(handle: ControllerHandle, checked: Checked, stop: StopRequest) -> Speeds:
    """Returns how fast each worker is. Raises LaunchFailed where one did not start."""
    try:
        return handle.measure(_settings(checked), stop.asked)
    except ControllerFailed as error:
        raise LaunchFailed(str(error)) from error


def _settings(checked: Checked) -> DeploymentSettings:
    config = checked.config
    return DeploymentSettings(
        plan=checked.plan, model_path=config.model.path, load_timeout_s=config.launch.load_timeout_s
    )


def _run(config: Config, control_address: str, gateway: GatewayProcess, stop: StopRequest, console: Console) -> int:
    """Follows the launch, then serves until asked to stop, then drains. Returns the exit code."""
    with _watch(control_address) as states:
        with LoadProgress(console) as progress:
            ready = _launch(states, gateway, stop, progress, timeout_s=_launch_limit_s(config))
        if ready:
            _say(console, event="serving", model=config.model.name, address=gateway.address)
            _supervise(states, gateway, stop, console)
    if not ready:
        _say(console, event="stopped_before_ready")
        gateway.stop(grace_s=0.0, stop=stop)
        return 1
    _say(console, event="draining", grace_s=config.gateway.drain_grace_s)
    finished = gateway.stop(grace_s=config.gateway.drain_grace_s, stop=stop) == 0
    _say(console, event="drained" if finished else "drain_cut")
    return 0 if finished else 1


class _ControllerLost(Exception):
    """The controller's stream ended. Raised once, after the last state."""


States = Callable[[], control_pb2.WatchResponse | None]


@contextmanager
def _watch(control_address: str) -> Iterator[States]:
    """Reads the controller's stream in a thread.

    Yields a function that returns the next state, or None after a while without one; it raises _ControllerLost.
    """
    states: queue.Queue[control_pb2.WatchResponse | _ControllerLost] = queue.Queue()
    with grpc.insecure_channel(control_address, options=_CHANNEL_OPTIONS) as channel:
        call = control_pb2_grpc.ControlStub(channel).Watch(control_pb2.WatchRequest())

        def read() -> None:
            cause = "it ended its stream"
            try:
                for state in call:
                    states.put(state)
            except grpc.RpcError as error:
                cause = error.code().name
            states.put(_ControllerLost(cause))

        def take() -> control_pb2.WatchResponse | None:
            try:
                state = states.get(timeout=_POLL_S)
            except queue.Empty:
                return None
            if isinstance(state, _ControllerLost):
                raise state
            return state

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            yield take
        finally:
            call.cancel()
            thread.join(timeout=2.0)


def _launch_limit_s(config: Config) -> float:
    """Returns the longest a launch may take: start_timeout_s each to reserve, reach and start workers, then loading."""
    return 3 * config.launch.start_timeout_s + config.launch.load_timeout_s + _LAUNCH_SLACK_S


def _launch(
    states: States, gateway: GatewayProcess, stop: StopRequest, progress: LoadProgress, *, timeout_s: float
) -> bool:
    """Waits until the deployment is ready. Returns False when asked to stop before.

    Raises:
        LaunchFailed: the first failing rank's cause; the controller or the gateway was lost; or ``timeout_s`` passed.
    """
    deadline = time.monotonic() + timeout_s
    while not stop.asked.is_set():
        try:
            state = states()
        except _ControllerLost as lost:
            raise LaunchFailed(f"the controller was lost while the deployment started ({lost})") from None
        progress.tick()
        if gateway.ended():
            raise LaunchFailed(f"the gateway ended with exit code {gateway.process.returncode}")
        if time.monotonic() > deadline:
            raise LaunchFailed(f"the deployment was not ready after {timeout_s:g} s")
        if state is None:
            continue
        progress.update(state)
        if state.phase == control_pb2.PHASE_FAILED:
            raise LaunchFailed(state.cause)
        if state.phase == control_pb2.PHASE_READY:
            return True
    return False


def _supervise(states: States, gateway: GatewayProcess, stop: StopRequest, console: Console) -> None:
    """Says what changes until asked to stop. The gateway goes on without a controller, so its loss is only said.

    Raises:
        ServiceEnded: the gateway ended by itself.
    """
    phases: dict[tuple[str, int], control_pb2.Phase.ValueType] = {}
    while not stop.asked.is_set():
        if gateway.ended():
            raise ServiceEnded(f"the gateway ended by itself with exit code {gateway.process.returncode}")
        try:
            state = states()
        except _ControllerLost as lost:
            _say(console, event="controller_lost", cause=lost)
            continue
        for replica in state.replicas if state is not None else ():
            key = (replica.name, replica.epoch)
            if phases.get(key, control_pb2.PHASE_READY) != replica.phase:
                phase = control_pb2.Phase.Name(replica.phase).removeprefix("PHASE_").lower()
                _say(console, event="replica", replica=replica.name, phase=phase, cause=replica.cause)
            phases[key] = replica.phase


def _say(console: Console, **pairs: object) -> None:
    _print(console, [key_values(**pairs)])


def _print(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
