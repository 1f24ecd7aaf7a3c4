"""Owns the Ray actor that keeps one worker process: it starts the worker, watches it, and takes it with it.

The controller's actor owns this one: when the controller is lost, Ray ends this actor, and the worker ends too.

All methods are coroutines, so Ray runs them on one event loop in one long-lived thread. That matters: the kernel's
parent-death signal follows the thread that started the process.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.launcher.node import advertised_host, available_memory_bytes
from orchestrator.launcher.process import WorkerArgs, WorkerEnd, WorkerFailed, WorkerProcess


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Says what a node has to give."""

    node: str
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Says where a worker listens.

    Attributes:
        ranks_port: where the other ranks of its replica connect, at the host of ``address``.
        target: what its code is generated for, such as ``avx2``.
    """

    node: str
    address: str
    ranks_port: int
    pid: int
    target: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotStarted:
    """Says why a worker did not come up. It takes an exception's place in an actor's answer: Ray would wrap that."""

    cause: str


class NodeAgent:
    """Keeps one worker process on this node.

    Args:
        node_ip: returns the address that Ray knows this node by. It is passed in, for this module knows no Ray.
    """

    def __init__(self, node_ip: Callable[[], str]) -> None:
        self._node_ip = node_ip
        self._worker: WorkerProcess | None = None

    async def probe(self) -> Probe:
        """Returns what this node has to give now."""
        return Probe(node=socket.gethostname(), available_bytes=available_memory_bytes())

    async def start(self, args: WorkerArgs, timeout_s: float) -> Started | NotStarted:
        """Starts the worker and waits until it listens."""
        bind_host = args.bind_host or self._node_ip()
        args = replace(args, bind_host=bind_host, advertise_host=advertised_host(bind_host, self._node_ip()))
        try:
            self._worker = await WorkerProcess.start(args, timeout_s=timeout_s)
        except WorkerFailed as error:
            return NotStarted(cause=str(error))
        return Started(
            node=socket.gethostname(),
            address=self._worker.address,
            ranks_port=self._worker.ranks_port,
            pid=self._worker.pid,
            target=self._worker.target,
        )

    async def wait(self) -> WorkerEnd:
        """Waits for the worker's end and says how it came."""
        assert self._worker is not None
        return await self._worker.wait()

    async def stop(self, grace_s: float) -> None:
        """Ends the worker."""
        if self._worker is not None:
            await self._worker.stop(grace_s=grace_s)
