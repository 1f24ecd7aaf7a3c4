"""The controller as a Ray actor, and the handle the command line holds on it.

The controller owns the actors that keep the workers: if it is lost, the workers end with it, and the gateway sees its
leaders go. It runs on the node of the command line and the gateway. Starting it again is not built yet.
"""

import logging
import sys
from typing import Any

import grpc
import ray

from orchestrator.controller.control import start_control_server
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.controller.shell import ControllerShell
from orchestrator.launcher.agent import node_ip
from orchestrator.launcher.cluster import LaunchSettings, RayLauncher, beside_driver, ray_cause
from orchestrator.launcher.node import advertised_host
from placement.errors import HeterodyneError

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
# A worker has 5 s to end by itself and 2 s more; then it is killed.
_STOP_TIMEOUT_S = 8.0
_PING_TIMEOUT_S = 3.0
_LOG_FORMAT = "%(asctime)s %(levelname)s controller %(message)s"


class ControllerFailed(HeterodyneError):
    """The controller actor did not come up."""


class Controller:
    """The actor. All coroutines, so one event loop and no locks."""

    def __init__(self) -> None:
        # What it does is told to whoever watches; only what went wrong is also logged, through Ray, to the driver.
        logging.basicConfig(
            level=logging.WARNING,
            stream=sys.stderr,
            format=_LOG_FORMAT,
            force=True,
        )
        self._shell: ControllerShell | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self, settings: DeploymentSettings, launch: LaunchSettings) -> str:
        """Begin the launch; returns the address of the control service, where its course can be watched."""
        self._shell = ControllerShell(launcher=RayLauncher(launch, settings.needed_bytes), settings=settings)
        self._server, address = await start_control_server(
            self._shell, launch.bind_host, advertise_host=advertised_host(launch.bind_host, node_ip())
        )
        await self._shell.launch()
        return address

    async def ping(self) -> None:
        """Answers, while it lives."""

    async def stop(self) -> None:
        """Stop every worker, give the resources back, close the control service."""
        if self._shell is not None:
            await self._shell.shutdown(_STOP_TIMEOUT_S)
        if self._server is not None:
            await self._server.stop(0.5)


class ControllerHandle:
    """The command line's hold on the controller actor."""

    def __init__(self, actor: Any, control_address: str) -> None:
        self._actor = actor
        self.control_address = control_address

    @classmethod
    def start(cls, settings: DeploymentSettings, launch: LaunchSettings) -> "ControllerHandle":
        """Create the actor and begin the launch. Needs Ray to be connected."""
        # Ray's own types cannot follow its remote calls.
        actor: Any = ray.remote(num_cpus=0)(Controller).options(scheduling_strategy=beside_driver()).remote()
        try:
            address: str = ray.get(actor.start.remote(settings, launch), timeout=_START_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise ControllerFailed(f"the controller did not start: {ray_cause(error)}") from error
        return cls(actor, address)

    def stop(self) -> None:
        """Stop the deployment; the actor goes with it."""
        try:
            # A signal to the whole process group ends a local Ray as well: then there is nobody to wait for.
            ray.get(self._actor.ping.remote(), timeout=_PING_TIMEOUT_S)
            ray.get(self._actor.stop.remote(), timeout=_STOP_TIMEOUT_S + 2.0)
        except ray.exceptions.RayError as error:
            # Its workers end with it: Ray ends the actors it owns, and each worker dies with its parent.
            logger.warning("controller_stop_forced cause=%s", type(error).__name__)
        ray.kill(self._actor)
