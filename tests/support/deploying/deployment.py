"""A whole deployment without Ray: real worker processes, a real controller shell and gateway, in the test's loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import yaml

from orchestrator.config.document import Config, load_config
from orchestrator.controller import state as machine
from orchestrator.controller.control import start_control_server
from orchestrator.controller.early import EarlyWorkers
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.controller.shell import ControllerShell
from orchestrator.deployment.auto_split import settle
from orchestrator.deployment.known_cluster import Machine
from orchestrator.deployment.offloading import offloading_events
from orchestrator.deployment.preflight import Checked, preflight
from orchestrator.gateway.server import Gateway, GatewaySettings
from orchestrator.launcher.agent import Started
from orchestrator.launcher.process import WorkerArgs, WorkerEnd, WorkerProcess
from placement.planning.memory import CPU_PROCESS_BYTES
from placement.planning.plan import Shard

START_S = 60.0
MACHINE = Machine(memory_bytes=2**36, num_cores=8)
"""For plans of more threads than the machine of the tests may have cores."""


class LocalLauncher:
    """The launcher's seam without Ray: worker processes that are children of the test."""

    def __init__(self) -> None:
        self.workers: dict[tuple[str, int], WorkerProcess] = {}

    async def reserve(self, shards: Mapping[tuple[str, int], Shard]) -> None:
        return None

    async def start(self, key: tuple[str, int], *, epoch: int, shard: Shard) -> Started:
        args = WorkerArgs(bind_host="127.0.0.1", device="cpu", num_threads=1, epoch=epoch)
        worker = self.workers[key] = await WorkerProcess.start(args, timeout_s=START_S)
        return Started(
            node="here", address=worker.address, ranks_port=worker.ranks_port, pid=worker.pid, target=worker.target
        )

    async def wait(self, key: tuple[str, int]) -> WorkerEnd:
        return await self.workers[key].wait()

    async def stop(self, key: tuple[str, int]) -> None:
        if key in self.workers:
            await self.workers[key].stop(grace_s=2.0)

    async def close(self) -> None:
        for key in self.workers:
            await self.stop(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What runs."""

    address: str
    gateway: Gateway
    shell: ControllerShell
    launcher: LocalLauncher
    control: grpc.aio.Server

    def pid(self, replica: str, rank: int = 0) -> int:
        """A rank's process id; the leader is rank 0."""
        return self.launcher.workers[replica, rank].pid


def make_config(directory: Path, model: Path, /, **sections: Mapping[str, object]) -> Config:
    """A configuration for ``model`` on any free port, written as a file and read back."""
    content: dict[str, dict[str, object]] = {
        "model": {"path": str(model)},
        "cluster": {"ray_address": "local"},
        "gateway": {"address": "127.0.0.1:0", "http_address": "127.0.0.1:0"},
        "serving": {"kv_cache": "16MiB"},
    }
    for section, values in sections.items():
        content.setdefault(section, {}).update(values)
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_config(path, environ={})


def two_ranks(split: Sequence[float] = (3, 1), count: int = 1) -> dict[str, dict[str, object]]:
    """Sections of a configuration with ``count`` replicas of two ranks each, whose shares are ``split``."""
    stages = [
        {"workers": [f"worker-{2 * i}", f"worker-{2 * i + 1}"], "tensor_split": list(split)} for i in range(count)
    ]
    return {
        "cluster": {"workers": [{"device": "cpu", "threads": 1, "count": 2 * count}]},
        "serving": {"parallelism": {"replicas": [{"stages": [stage]} for stage in stages]}},
    }


def shared_sequences(split: Sequence[float] = (3, 1)) -> dict[str, dict[str, object]]:
    """Sections of a configuration with one replica, whose ranks share sequences."""
    stage = {"workers": [f"worker-{i}" for i in range(len(split))], "sequence_split": list(split)}
    return {
        "cluster": {"workers": [{"device": "cpu", "threads": 1, "count": len(split)}]},
        "serving": {"parallelism": {"replicas": [{"stages": [stage]}]}},
    }


def in_stages(*splits: Sequence[float], last_layers: int | None = None) -> dict[str, dict[str, object]]:
    """Sections of a configuration with one replica, of a stage for each of ``splits``: its ranks' shares.

    Args:
        last_layers: of the last stage; None: dealt out evenly.
    """
    stages: list[dict[str, object]] = []
    count = 0
    for split in splits:
        stages.append({"workers": [f"worker-{count + rank}" for rank in range(len(split))]})
        stages[-1] |= {"tensor_split": list(split)} if len(split) > 1 else {}
        count += len(split)
    stages[-1] |= {} if last_layers is None else {"layers": last_layers}
    return {
        "cluster": {"workers": [{"device": "cpu", "threads": 1, "count": count}]},
        "serving": {"parallelism": {"replicas": [{"stages": stages}]}},
    }


def two_stages() -> dict[str, dict[str, object]]:
    """Sections of a configuration with one replica of two stages, of a rank each."""
    return in_stages((1,), (1,), last_layers=1)


def too_large_for_each(
    directory: Path, model: Path, *threads: int, pools: Mapping[str, object] | None = None
) -> Config:
    """A configuration of workers with so many threads, none of which has quite the memory for all of ``model``."""
    workers = [{"name": f"w{i}", "device": "cpu", "threads": count} for i, count in enumerate(threads)]
    # The context takes all of the KV cache, so that none smaller would do.
    sections: dict[str, dict[str, object]] = {
        "model": {"max_context_tokens": 256},
        "serving": {"token_budget": 64, "max_num_seqs": 8, "pools": pools},
    }
    whole = preflight(make_config(directory, model, **sections, cluster={"workers": workers}), machine=MACHINE).plan
    per_token = whole.replicas[0].leader.kv_bytes // whole.replicas[0].num_kv_tokens
    sections["serving"]["kv_cache"] = 256 * per_token
    again = preflight(make_config(directory, model, **sections, cluster={"workers": workers}), machine=MACHINE)
    leader = again.plan.replicas[0].leader
    needed = leader.weight_bytes + leader.kv_bytes + leader.workspace_bytes + CPU_PROCESS_BYTES
    small = [{**worker, "memory": needed - 1} for worker in workers]
    return make_config(directory, model, **sections, cluster={"workers": small})


def settings_of(checked: Checked) -> DeploymentSettings:
    """As ``serve`` gives them to the controller."""
    config = checked.config
    return DeploymentSettings(
        plan=checked.plan,
        model_path=config.model.path,
        load_timeout_s=START_S,
        fingerprint=checked.fingerprint,
        kv_format=config.serving.kv_format,
        offloading=" ".join(said.sentence for said in offloading_events(checked.offloading)),
    )


@contextlib.asynccontextmanager
async def deploy(config: Config, launcher: LocalLauncher | None = None) -> AsyncIterator[Deployment]:
    """Run ``config`` until the block ends; the block begins once every replica is ready and reports."""
    checked = preflight(config)
    launcher = launcher or LocalLauncher()
    early = EarlyWorkers(launcher)
    if (trial := checked.trial) is not None:
        try:
            checked = settle(checked, await early.measure(settings_of(trial))).checked
        except BaseException:
            await early.close()
            raise
    shell = ControllerShell(launcher=early, settings=settings_of(checked))
    server, control_address = await start_control_server(shell, "127.0.0.1")
    gateway = Gateway(
        GatewaySettings(
            config=config,
            control_address=control_address,
            max_context_tokens=checked.plan.model.max_context_tokens,
            dtype=checked.plan.dtype,
        )
    )
    try:
        await shell.launch(early.epoch)
        address = await gateway.start()
        async with asyncio.timeout(START_S):
            while len(gateway.fleet.loads()) < len(checked.plan.replicas):
                assert shell.state.phase is not machine.Phase.FAILED, shell.state.cause
                await asyncio.sleep(0.02)
        yield Deployment(address=address, gateway=gateway, shell=shell, launcher=launcher, control=server)
    finally:
        await gateway.drain()
        await shell.shutdown(10.0)
        await server.stop(0.1)


async def settled(deployment: Deployment, *, timeout_s: float = 5.0) -> None:
    """Wait until nothing is in flight and every block of every replica that lives is free again."""
    async with asyncio.timeout(timeout_s):
        while True:
            loads = deployment.gateway.fleet.loads()
            assert loads, "no replica lives"
            busy = [load for load in loads if load.num_running or load.num_waiting]
            kept = [load for load in loads if load.free_blocks != load.total_blocks]
            if not busy and not kept and deployment.gateway.admission.in_flight == 0:
                return
            await asyncio.sleep(0.05)
