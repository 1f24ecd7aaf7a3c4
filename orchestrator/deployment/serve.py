"""Runs one deployment for ``serve``, from preflight to the end of the last process.

This process is the Ray driver and the parent of the gateway. The order of starting is controller, gateway, workers;
of stopping gateway (drained), workers, Ray. Whatever fails first is the message that the user sees.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.document import Config, load_config
from orchestrator.controller.actor import ControllerFailed, ControllerHandle, Speeds
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.deployment import events
from orchestrator.deployment.auto_split import settle
from orchestrator.deployment.following import follow_launch, supervise, watch
from orchestrator.deployment.gateway_process import GatewayProcess, gateway_process
from orchestrator.deployment.load_progress import LoadProgress
from orchestrator.deployment.offloading import offloading_events
from orchestrator.deployment.plan_lines import plan_events, warning_events
from orchestrator.deployment.preflight import Checked, on_hosts, preflight
from orchestrator.deployment.seats import Seats, crowded, find_seats, listening_host, rank_labels, worker_needs
from orchestrator.deployment.stop_request import StopRequest
from orchestrator.errors import LaunchFailed, ServiceEnded
from orchestrator.event_log import EventLog, Said
from orchestrator.launcher.cluster import LaunchSettings, check_resources, connect, disconnect, own_node_id
from orchestrator.launcher.ray_access import lets_in_anybody
from orchestrator.launcher.ray_output import take_output

# Beyond the limits of the launch's own steps, whose causes say more.
_LAUNCH_SLACK_S = 30.0
# Beyond the silence after which the gateway takes a replica for lost.
_LOSS_SEEN_S = 1.0


def serve(path: Path, *, overrides: Sequence[str], log: EventLog, on_ready: Callable[[], None] = lambda: None) -> int:
    """Serves until stopped. Returns 0 when every accepted request finished, 1 when the drain had to be cut.

    Args:
        on_ready: is called once requests are served.

    Raises:
        HeterodyneError: a mistake in the input, before anything was started; a launch that failed; or a part
            that ended by itself.
    """
    checked = preflight(load_config(path, overrides=overrides))
    _tell(log, warning_events(checked))
    with StopRequest.taken() as stop, _ray(checked, stop, log):
        checked, seats = _seated(checked, stop, log)
        with (
            _controller(checked, seats, stop, log) as launched,
            gateway_process(path, overrides, launched.checked, launched.control_address, stop, log) as gateway,
        ):
            return _run(launched, gateway, stop, log, on_ready)


@contextmanager
def _ray(checked: Checked, stop: StopRequest, log: EventLog) -> Iterator[None]:
    """Starts or joins Ray, and sees that it has what the workers ask for. Leaves it at the end of the block."""
    cluster, needs = checked.config.cluster, worker_needs(checked)
    address, num_cpus = cluster.ray_address or "local", sum(need.num_cpus for need in needs)
    if checked.trial is None and cluster.is_local:
        _tell(log, plan_events(checked))
    log.tell(events.connecting(address))
    take_output(log.pass_on)
    connect(address, num_cpus=num_cpus, stop=stop.asked)
    try:
        stop.install()  # Ray takes the signals when it connects
        _warn_of_strangers(address, log)
        check_resources(
            num_cpus=num_cpus,
            num_gpus=sum(need.num_gpus for need in needs),
            most_cpus=max(need.num_cpus for need in needs),
        )
        yield
    finally:
        disconnect()


def _seated(checked: Checked, stop: StopRequest, log: EventLog) -> tuple[Checked, Seats]:
    """Gives each worker a machine of a cluster that was joined, and plans for these machines."""
    needs = worker_needs(checked)
    if checked.config.cluster.is_local:
        return checked, Seats(needs=tuple(needs), hosts=None)
    seats = find_seats(checked.config, needs, stop.asked, num_layers=checked.model.num_layers)
    if seats.hosts is None:
        log.tell(events.without_hosts())
    else:
        checked = on_hosts(checked, seats.hosts)
    if (found := crowded(checked.config, seats)) is not None:
        log.tell(events.crowded(found[0].name, [host.name for host in found[1]]))
    _tell(log, plan_events(checked) if checked.trial is None else ())
    return checked, seats


def _warn_of_strangers(ray_address: str, log: EventLog) -> None:
    """Says so where the Ray that was joined has no authentication; one that was started here has."""
    if lets_in_anybody():
        log.tell(events.without_authentication(ray_address))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    """The deployment that is being launched, and where its course can be watched."""

    checked: Checked
    control_address: str


@contextmanager
def _controller(checked: Checked, seats: Seats, stop: StopRequest, log: EventLog) -> Iterator[_Launched]:
    """Starts a controller, measures the workers where ``auto`` decides by that, and begins the launch."""
    config, trial = checked.config, checked.trial
    handle = ControllerHandle(
        LaunchSettings(
            bind_host=listening_host(config, seats, own_node_id()),
            start_timeout_s=config.launch.start_timeout_s,
            labels=rank_labels(trial or checked, seats.needs),
            log_level=log.level.value,
        )
    )
    try:
        if trial is not None:
            log.tell(events.measuring(len(trial.workers), splits=checked.split_by is not None))
            settled = settle(checked, _measure(handle, trial, stop))
            checked = settled.checked
            _tell(log, [settled.said, *plan_events(checked)])
        yield _Launched(checked=checked, control_address=handle.start(settings_of(checked)))
    finally:
        handle.stop()


def _measure(handle: ControllerHandle, checked: Checked, stop: StopRequest) -> Speeds:
    """Returns how fast each worker is. Raises LaunchFailed where one did not start."""
    try:
        return handle.measure(settings_of(checked), stop.asked)
    except ControllerFailed as error:
        raise LaunchFailed(str(error)) from error


def settings_of(checked: Checked) -> DeploymentSettings:
    """Returns what the controller is told of a deployment."""
    config = checked.config
    attention = config.serving.attention
    return DeploymentSettings(
        plan=checked.plan,
        model_path=config.model.path,
        load_timeout_s=config.launch.load_timeout_s,
        fingerprint=checked.fingerprint,
        stall_timeout_s=config.gateway.stall_timeout_s,
        kv_format=config.serving.kv_format,
        q_first=attention is None or attention.q_first is not False,
        staggered=attention is None or attention.staggered,
        offloading=" ".join(said.sentence for said in offloading_events(checked.offloading)),
    )


def _run(
    launched: _Launched, gateway: GatewayProcess, stop: StopRequest, log: EventLog, on_ready: Callable[[], None]
) -> int:
    """Follows the launch, then serves until asked to stop, then drains. Returns the exit code."""
    config = launched.checked.config
    with watch(launched.control_address) as states:
        with LoadProgress(log) as progress:
            ready = follow_launch(states, gateway, stop, progress, timeout_s=_launch_limit_s(config))
        if ready is not None:
            log.tell(events.ready(launched.checked, gateway.address, gateway.http_address))
            on_ready()
            if (cause := supervise(ready, states, gateway, stop, log)) is not None:
                # Whoever still waits for an answer hears from the gateway which replica was lost.
                gateway.stop(grace_s=config.gateway.heartbeat_timeout_s + _LOSS_SEEN_S, stop=stop)
                raise ServiceEnded(f"no replica is left, and a lost one is not started again: {cause}")
    if ready is None:
        log.tell(events.stopped_before_ready())
        gateway.stop(grace_s=0.0, stop=stop)
        return 1
    log.tell(events.draining(config.gateway.drain_grace_s, gateway.num_requests()))
    code = gateway.stop(grace_s=config.gateway.drain_grace_s, stop=stop)
    if code == 0:
        log.tell(events.drained())
    elif code < 0:  # else it has said itself what was cut
        log.tell(events.gateway_killed())
    return 0 if code == 0 else 1


def _launch_limit_s(config: Config) -> float:
    """Returns the longest a launch may take: start_timeout_s each to reserve, reach and start workers, then loading."""
    return 3 * config.launch.start_timeout_s + config.launch.load_timeout_s + _LAUNCH_SLACK_S


def _tell(log: EventLog, events: Iterable[Said]) -> None:
    for said in events:
        log.tell(said)
