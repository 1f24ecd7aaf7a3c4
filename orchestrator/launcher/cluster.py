"""Joins or starts Ray for the command line, and owns the placement group that ranks run in."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from orchestrator.launcher.agent import NodeAgent, NotStarted, Probe, Started
from orchestrator.launcher.hosts import node_resources
from orchestrator.launcher.joining import join, not_joined
from orchestrator.launcher.no_room import no_room
from orchestrator.launcher.node import available_cores
from orchestrator.launcher.process import HowEnded, WorkerArgs, WorkerEnd, WorkerFailed, started_late
from orchestrator.launcher.ray_access import node_ip, ray_cause, start_own_ray
from orchestrator.launcher.reach import check_reached
from placement.errors import InvalidConfig
from placement.planning.attention import NO_PART
from placement.planning.memory import format_bytes
from placement.planning.plan import Shard
from placement.planning.seating import need_of
from protos.codec.log_record import said

logger = logging.getLogger(__name__)

# Names a rank: (replica, rank).
RankKey = tuple[str, int]
T = TypeVar("T")


def connect(address: str, *, num_cpus: int, stop: threading.Event) -> None:
    """Joins the Ray cluster at ``address``, or starts one on this machine for ``local``.

    Raises:
        InvalidConfig: no cluster answers at ``address``, or it asks for a token that this process has not.
        LaunchFailed: ``stop`` was set while a cluster was joined.
    """
    if address != "local":
        join(address, stop)
        return
    try:
        start_own_ray(num_cpus=max(num_cpus, available_cores()))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise not_joined(address, str(error)) from error


def own_node_id() -> str:
    """Returns the id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def check_resources(*, num_cpus: int, num_gpus: int, most_cpus: int) -> None:
    """Refuses what the whole cluster could never place, before anything is launched on it.

    Args:
        most_cpus: the CPUs of the worker that asks for most of them, all of which one node must have.

    Raises:
        InvalidConfig: the cluster has fewer CPUs or GPUs than the workers ask for, or no node has what one asks for.
    """
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name, needed, key in (("GPU", num_gpus, "device"), ("CPU", num_cpus, "threads")):
        there = int(resources.get(name, 0))
        if needed > there:
            raise InvalidConfig(
                field=f"cluster.workers: {key}",
                value=f"{needed} {name}",
                problem=f"asks for more than the {there} {name} of the Ray cluster",
                fix=f"Lower {key} or count, or add nodes."
                if name == "CPU"
                else "Set device: cpu, or start Ray on nodes with GPUs.",
            )
    largest = int(max((node.total.get("CPU", 0.0) for node in node_resources()), default=0.0))
    if most_cpus > largest:
        raise InvalidConfig(
            field="cluster.workers: threads",
            value=most_cpus,
            problem=f"is more than the {largest} CPU that a node of the Ray cluster has at most",
            fix=f"Set it to {largest} or less, or add a node that has as many.",
        )


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Returns the strategy that places an actor on the driver's node, so that no other node's loss ends it."""
    return NodeAffinitySchedulingStrategy(own_node_id(), soft=False)


def disconnect() -> None:
    """Leave Ray; a cluster that ``connect`` started ends."""
    ray.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSettings:
    """How the launcher starts workers.

    Attributes:
        bind_host: the address that workers listen on; None: each on its node's own, and the controller on loopback.
        labels: Ray node labels that a rank's node must carry, by rank.
        log_level: the least important lines that workers and the controller log.
    """

    bind_host: str | None
    start_timeout_s: float
    labels: Mapping[RankKey, Mapping[str, str]]
    stop_grace_s: float = 5.0
    log_level: str = "info"


class RayLauncher:
    """Starts, watches and stops the worker processes of a deployment, one Ray actor for each.

    Lives in the controller, whose event loop every method runs on. The controller owns the actors: when it is lost
    they end, and the workers with them. Starting a lost controller again is not built yet.

    Ray picks the GPU of a cuda rank and shows the worker that one alone, as cuda:0. The index a user wrote says only
    that local workers with different ones get different GPUs.

    Memory is no part of the reservation: what Ray counts as its own leaves out its object store, 30 % of what is free
    at its start, so that a plan which fits a small machine would never be placed.

    Args:
        needed_bytes: all that a rank's process takes on a CPU node.
    """

    def __init__(self, settings: LaunchSettings, needed_bytes: Callable[[Shard], int]) -> None:
        self._settings = settings
        self._needed_bytes = needed_bytes
        self._group: PlacementGroup | None = None
        self._bundles: dict[RankKey, int] = {}
        self._agents: dict[RankKey, Any] = {}

    async def reserve(self, shards: Mapping[RankKey, Shard]) -> None:
        """Reserves what all ranks need, in one placement group.

        Raises:
            WorkerFailed: the cluster cannot give it within the start timeout.
        """
        keys = list(shards)
        bundles = [_resources(shards[key]) for key in keys]
        self._bundles = {key: i for i, key in enumerate(keys)}
        self._group = placement_group(
            bundles,
            strategy="PACK",
            bundle_label_selector=[dict(self._settings.labels.get(key, {})) for key in keys],
        )
        try:
            await asyncio.wait_for(self._group.ready(), self._settings.start_timeout_s)
        except TimeoutError:
            needs = [need_of(shards[key].device, self._settings.labels.get(key, {})) for key in keys]
            raise WorkerFailed(no_room(needs, node_resources())) from None

    async def start(self, key: RankKey, *, epoch: int, shard: Shard) -> Started:
        """Starts a worker.

        Raises:
            WorkerFailed: the node has not the memory, the worker did not come up, or it cannot be reached.
        """
        agent = self._agent(key, shard)
        await self._check_memory(agent, shard)
        args = WorkerArgs(
            bind_host=self._settings.bind_host,
            # Ray sets CUDA_VISIBLE_DEVICES to the one GPU of the agent's bundle.
            device="cpu" if shard.device.kind == "cpu" else "cuda:0",
            num_threads=shard.device.num_threads,
            epoch=epoch,
            name=shard.device.worker,
            log_level=self._settings.log_level,
        )
        timeout_s = self._settings.start_timeout_s
        started: Started | NotStarted = await self._answer(agent.start.remote(args, timeout_s), timeout_s + 5.0)
        if isinstance(started, NotStarted):
            raise WorkerFailed(started.cause)
        await check_reached(started.address, node=started.node)
        return started

    async def _answer(self, call: Awaitable[T], timeout_s: float) -> T:
        """Returns an agent's answer. Raises WorkerFailed where none comes."""
        try:
            return await asyncio.wait_for(call, timeout_s)
        except TimeoutError:
            raise WorkerFailed(started_late(self._settings.start_timeout_s)) from None
        except ray.exceptions.RayError as error:
            raise WorkerFailed(f"the Ray actor that starts it failed ({ray_cause(error)})") from error

    def _agent(self, key: RankKey, shard: Shard) -> Any:
        assert self._group is not None, "reserve comes first"
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=self._bundles[key]
        )
        num_gpus = 1 if shard.device.kind == "cuda" else 0
        actor = ray.remote(num_cpus=0, num_gpus=num_gpus, max_restarts=0)(NodeAgent)
        self._agents[key] = actor.options(scheduling_strategy=strategy).remote(node_ip)
        return self._agents[key]

    async def _check_memory(self, agent: Any, shard: Shard) -> None:
        probe: Probe = await self._answer(agent.probe.remote(), self._settings.start_timeout_s)
        needed = self._needed_bytes(shard)
        if shard.device.kind == "cpu" and needed > probe.available_bytes:
            setting = "serving.attention.kv_cache" if shard.part == NO_PART else "serving.kv_cache"
            raise WorkerFailed(
                f"not enough memory on {probe.node}: {format_bytes(needed)} are needed, "
                f"{format_bytes(shard.weight_bytes)} for weights and {format_bytes(shard.kv_bytes)} for KV blocks, and "
                f"{format_bytes(probe.available_bytes)} are free. Free memory there, set {setting} to less, or "
                "choose another node"
            )

    async def wait(self, key: RankKey) -> WorkerEnd:
        """Waits for a worker's end and says how it came; the loss of its agent counts as one.

        A worker that was stopped before has ended.
        """
        agent = self._agents.get(key)
        if agent is None:
            return WorkerEnd(how=HowEnded.STOPPED, cause="stopped")
        try:
            end: WorkerEnd = await agent.wait.remote()
        except ray.exceptions.RayError as error:
            cause = f"its node or its Ray actor was lost ({ray_cause(error)})"
            return WorkerEnd(how=HowEnded.FAILED, cause=cause)
        return end

    async def stop(self, key: RankKey) -> None:
        """Ends a worker and its actor, by force where they do not end by themselves."""
        agent = self._agents.pop(key, None)
        if agent is None:
            return
        grace_s = self._settings.stop_grace_s
        try:
            await asyncio.wait_for(agent.stop.remote(grace_s), grace_s + 2.0)
        except (TimeoutError, ray.exceptions.RayError):
            where = {"replica": key[0], "rank": key[1]}
            words = "Rank %d of %s did not end when it was asked to, and was killed."
            logger.warning(words, key[1], key[0], extra=said("worker_stop_forced", **where))
        finally:
            ray.kill(agent)

    async def close(self) -> None:
        """Ends every worker and gives the placement group back."""
        await asyncio.gather(*(self.stop(key) for key in list(self._agents)))
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def _resources(shard: Shard) -> dict[str, float]:
    need = need_of(shard.device, {})
    resources: dict[str, float] = {"CPU": need.num_cpus}
    return resources | {"GPU": need.num_gpus} if need.num_gpus else resources
