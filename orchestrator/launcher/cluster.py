"""Ray itself: joined or started for the command line, and the placement group that ranks run in."""

import asyncio
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.launcher.agent import NodeAgent, Probe, Started
from orchestrator.launcher.process import WorkerArgs, WorkerFailed
from placement.errors import InvalidConfig
from placement.plan import Shard

logger = logging.getLogger(__name__)

# Names a rank: (replica, rank).
RankKey = tuple[str, int]


def connect(address: str, *, num_cpus: int) -> None:
    """Join the Ray cluster at ``address``, or start one on this machine for ``local``.

    Raises:
        InvalidConfig: no cluster answers at ``address``.
    """
    # Recent versions turn token auth on by themselves for local clusters; the user's own choice stands.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        if address == "local":
            ray.init(
                address="local",
                num_cpus=max(num_cpus, os.cpu_count() or 1),
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
        else:
            ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InvalidConfig(
            field="cluster.ray_address",
            value=address,
            problem=f"no Ray cluster could be joined or started ({error})",
            fix="Start one with `ray start --head`, name its address, or write `local`.",
        ) from error


def disconnect() -> None:
    """Leave Ray; a cluster that ``connect`` started ends."""
    ray.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSettings:
    """How workers are started.

    Attributes:
        labels: Ray node labels that a rank's node must carry, by rank.
    """

    bind_host: str
    start_timeout_s: float
    load_timeout_s: float
    labels: Mapping[RankKey, Mapping[str, str]]
    stop_grace_s: float = 5.0


class RayLauncher:
    """Starts, watches and stops the worker processes of a deployment, one Ray actor for each.

    Lives in the controller, whose event loop every method runs on.
    """

    def __init__(self, settings: LaunchSettings) -> None:
        self._settings = settings
        self._group: PlacementGroup | None = None
        self._bundles: dict[RankKey, int] = {}
        self._agents: dict[RankKey, Any] = {}

    async def reserve(self, shards: Mapping[RankKey, Shard]) -> None:
        """Reserve what all ranks need, in one placement group.

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
            free = ray.available_resources()  # type: ignore[no-untyped-call]
            raise WorkerFailed(
                f"the Ray cluster could not place {bundles} within {self._settings.start_timeout_s:g} s; free there: "
                f"{free}. Lower threads or count in cluster.workers, or add nodes"
            ) from None

    async def start(self, key: RankKey, *, epoch: int, shard: Shard) -> Started:
        """Start a worker.

        Raises:
            WorkerFailed: the node has not the memory, or the worker did not come up.
        """
        agent = self._agent(key)
        await self._check_memory(agent, shard)
        args = WorkerArgs(
            bind_host=self._settings.bind_host,
            # Ray shows the process only the GPU it was given, as number 0.
            device="cpu" if shard.device.kind == "cpu" else "cuda:0",
            num_threads=shard.device.num_threads,
            epoch=epoch,
        )
        timeout_s = self._settings.start_timeout_s
        started: Started | str = await asyncio.wait_for(agent.start.remote(args, timeout_s), timeout_s + 5.0)
        if isinstance(started, str):
            raise WorkerFailed(started)
        return started

    def _agent(self, key: RankKey) -> Any:
        assert self._group is not None, "reserve comes first"
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=self._bundles[key]
        )
        actor = ray.remote(num_cpus=0, max_restarts=0)(NodeAgent)
        self._agents[key] = actor.options(scheduling_strategy=strategy).remote()
        return self._agents[key]

    async def _check_memory(self, agent: Any, shard: Shard) -> None:
        probe: Probe = await asyncio.wait_for(agent.probe.remote(), self._settings.start_timeout_s)
        needed = shard.weight_bytes + shard.kv_bytes
        if shard.device.kind == "cpu" and needed > probe.available_bytes:
            raise WorkerFailed(
                f"not enough memory on {probe.node}: weights and KV blocks take {needed / 2**30:.2f} GiB, "
                f"{probe.available_bytes / 2**30:.2f} GiB is free. Lower serving.kv_cache or choose another node"
            )

    async def wait(self, key: RankKey) -> str:
        """Wait for a worker's end and say how it came; a lost agent counts as one."""
        try:
            cause: str = await self._agents[key].wait.remote()
        except ray.exceptions.RayActorError as error:
            return f"its node or its Ray actor was lost ({type(error).__name__})"
        return cause

    async def stop(self, key: RankKey) -> None:
        """End a worker and its actor, by force if it must be."""
        agent = self._agents.pop(key, None)
        if agent is None:
            return
        grace_s = self._settings.stop_grace_s
        try:
            await asyncio.wait_for(agent.stop.remote(grace_s), grace_s + 2.0)
        except (TimeoutError, ray.exceptions.RayActorError):
            logger.warning("worker_stop_forced replica=%s rank=%d", *key)
        ray.kill(agent)

    async def close(self) -> None:
        """End every worker and give the placement group back."""
        await asyncio.gather(*(self.stop(key) for key in list(self._agents)))
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def _resources(shard: Shard) -> dict[str, float]:
    if shard.device.kind == "cpu":
        return {"CPU": shard.device.num_threads}
    return {"CPU": 1, "GPU": 1}
