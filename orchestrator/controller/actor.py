"""Runs the controller as a Ray actor, and gives the command line a handle on it.

The controller owns the actors that keep the workers: if it is lost, the workers end with it, and the gateway sees its
leaders go. It runs on the node of the command line and the gateway. Starting it again is not built yet.
"""

import logging
import threading
import time
from typing import Any

import grpc
import ray

from orchestrator.controller.control import start_control_server
from orchestrator.controller.early import MEASURE_TIMEOUT_S, EarlyWorkers
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.controller.shell import ControllerShell
from orchestrator.launcher.agent import NotStarted
from orchestrator.launcher.cluster import LaunchSettings, RayLauncher, beside_driver
from orchestrator.launcher.node import advertised_host
from orchestrator.launcher.process import WorkerFailed
from orchestrator.launcher.ray_access import node_ip, ray_cause
from placement.errors import HeterodyneError
from placement.measured.speed import DeviceSpeed, NotMeasured
from protos.codec.log_record import log_to_parent, said

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
# A worker has 5 s to end by itself and 2 s more; then it is killed.
_STOP_TIMEOUT_S = 8.0
_PING_TIMEOUT_S = 3.0
_POLL_S = 0.2

# The speed of each worker, or why it is not known.
Speeds = tuple[DeviceSpeed | NotMeasured, ...]


class ControllerFailed(HeterodyneError):
    """The controller actor, or a worker that it was to measure, did not come up; the text is the cause."""


class Controller:
    """The actor. All its methods are coroutines, so they share one event loop and need no locks."""

    def __init__(self, log_level: str) -> None:
        # What it does is told to whoever watches; only what went wrong is also logged, through Ray, to the driver.
        log_to_parent("controller", level=log_level)
        self._workers: EarlyWorkers | None = None
        self._shell: ControllerShell | None = None
        self._server: grpc.aio.Server | None = None

    async def measure(self, settings: DeploymentSettings, launch: LaunchSettings) -> Speeds | NotStarted:
        """Starts the workers and measures how fast each is, in the order of ranks."""
        self._workers = EarlyWorkers(RayLauncher(launch, settings.needed_bytes))
        try:
            return await self._workers.measure(settings)
        except WorkerFailed as error:
            return NotStarted(cause=str(error))

    async def start(self, settings: DeploymentSettings, launch: LaunchSettings) -> str:
        """Begins the launch, with the workers that were measured where there are any.

        Returns:
            The address of the control service, where the course of the launch can be watched.
        """
        if self._workers is None:
            self._workers = EarlyWorkers(RayLauncher(launch, settings.needed_bytes))
        self._shell = ControllerShell(launcher=self._workers, settings=settings)
        # Whoever watches it runs on this node.
        bind_host = launch.bind_host or "127.0.0.1"
        self._server, address = await start_control_server(
            self._shell, bind_host, advertise_host=advertised_host(bind_host, node_ip())
        )
        await self._shell.launch(self._workers.epoch)
        return address

    async def ping(self) -> None:
        """Answers as long as the actor lives."""

    async def stop(self) -> None:
        """Stops every worker, gives the resources back, closes the control service."""
        if self._shell is not None:
            await self._shell.shutdown(_STOP_TIMEOUT_S)
        elif self._workers is not None:
            await self._workers.close()
        if self._server is not None:
            await self._server.stop(0.5)


class ControllerHandle:
    """Holds the controller actor for the command line."""

    def __init__(self, launch: LaunchSettings) -> None:
        """Creates the actor. Ray must be connected."""
        self._launch = launch
        # Ray's own types cannot follow its remote calls.
        actor: Any = ray.remote(num_cpus=0)(Controller).options(scheduling_strategy=beside_driver())
        self._actor: Any = actor.remote(launch.log_level)

    def measure(self, settings: DeploymentSettings, stop: threading.Event) -> Speeds:
        """Starts the workers of a provisional plan and measures how fast each is, in the order of ranks.

        Raises:
            ControllerFailed: a worker did not start, the controller was lost, or ``stop`` was set before the end.
        """
        answer = self._actor.measure.remote(settings, self._launch)
        # Reserving, reaching and starting each have this limit of their own.
        deadline = time.monotonic() + 3 * self._launch.start_timeout_s + MEASURE_TIMEOUT_S + _START_TIMEOUT_S
        while not ray.wait([answer], timeout=_POLL_S)[0]:
            if stop.is_set():
                raise ControllerFailed("stopped while workers were measured")
            if time.monotonic() > deadline:
                raise ControllerFailed("the controller did not answer while workers were measured")
        try:
            found: Speeds | NotStarted = ray.get(answer)
        except ray.exceptions.RayError as error:
            raise ControllerFailed(f"the controller failed to measure workers: {ray_cause(error)}") from error
        if isinstance(found, NotStarted):
            raise ControllerFailed(found.cause)
        return found

    def start(self, settings: DeploymentSettings) -> str:
        """Begins the launch and returns the address where its course can be watched."""
        try:
            address: str = ray.get(self._actor.start.remote(settings, self._launch), timeout=_START_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise ControllerFailed(f"the controller did not start: {ray_cause(error)}") from error
        return address

    def stop(self) -> None:
        """Stops the deployment and ends the actor."""
        try:
            # A signal to the whole process group ends a local Ray as well: then there is nobody to wait for.
            ray.get(self._actor.ping.remote(), timeout=_PING_TIMEOUT_S)
            ray.get(self._actor.stop.remote(), timeout=_STOP_TIMEOUT_S + 2.0)
        except ray.exceptions.RayError as error:
            # Its workers end with it: Ray ends the actors it owns, and each worker dies with its parent.
            cause = type(error).__name__
            words = "The controller did not end when it was asked to (%s); it was killed, and its workers with it."
            logger.warning(words, cause, extra=said("controller_stop_forced", cause=cause))
        ray.kill(self._actor)
