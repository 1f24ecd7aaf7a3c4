"""A model that no worker has memory for, cut by how fast its workers are: real worker processes, before and after."""

import asyncio
import dataclasses
import os
import signal
import sys
from pathlib import Path

import grpc
import psutil
import pytest

from orchestrator.controller.early import EarlyWorkers
from orchestrator.controller.shell import ControllerShell
from orchestrator.controller.state import Phase
from orchestrator.deployment.auto_split import settle
from orchestrator.deployment.preflight import preflight
from orchestrator.launcher.agent import Started
from orchestrator.launcher.process import WorkerArgs, WorkerFailed, WorkerProcess
from placement.measured.speed import DeviceSpeed, NotMeasured
from placement.planning.plan import Shard
from protos.heterodyne.v1 import inference_pb2_grpc
from tests.support.clocks import PATIENCE_S, until
from tests.support.deploying.deployment import (
    MACHINE,
    START_S,
    LocalLauncher,
    deploy,
    make_config,
    settings_of,
    settled,
    too_large_for_each,
)
from tests.support.gateway.answers import answer, request, tokens

_SLOW = """
import sys
from workers import __main__ as worker
from workers.startup import speed
seconds = speed._seconds
speed._seconds = lambda *args: 8 * seconds(*args)
sys.exit(worker.main())
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SlowWorker(WorkerArgs):
    """One whose products take eight times as long, as it measures them; a busy machine hides much less."""

    def argv(self) -> list[str]:
        return [sys.executable, "-c", _SLOW, *WorkerArgs.argv(self)[3:]]


class Unequal(LocalLauncher):
    """Rank 1 is slow, whatever its threads."""

    async def start(self, key: tuple[str, int], *, epoch: int, shard: Shard) -> Started:
        kind = SlowWorker if key[1] else WorkerArgs
        args = kind(bind_host="127.0.0.1", device="cpu", num_threads=1, epoch=epoch)
        worker = self.workers[key] = await WorkerProcess.start(args, timeout_s=START_S)
        return Started(node="here", address=worker.address, ranks_port=worker.ranks_port, pid=worker.pid)


async def test_the_faster_worker_gets_more_of_the_model_whatever_their_threads(
    served_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By threads the first would have a quarter; measured, it has about eight ninths."""
    monkeypatch.setattr("orchestrator.deployment.preflight.measure_machine", lambda: MACHINE)
    config = too_large_for_each(tmp_path, served_checkpoint, 1, 3)
    first, second = preflight(config).plan.replicas[0].shards
    assert len(first.part.ffn_columns) < len(second.part.ffn_columns)
    asked = request(prompt="once upon a time", max_tokens=20)
    launcher = Unequal()
    async with deploy(config, launcher) as running, grpc.aio.insecure_channel(running.address) as channel:
        (replica,) = running.shell.state.replicas
        columns = [len(rank.shard.part.ffn_columns) for rank in replica.ranks]
        assert columns[0] > 1.5 * columns[1] > 0
        assert [rank.pid for rank in replica.ranks] == [launcher.workers["replica-0", i].pid for i in range(2)]
        cut = tokens(await answer(inference_pb2_grpc.InferenceStub(channel), asked))
        await settled(running, timeout_s=PATIENCE_S)
    (tmp_path / "whole").mkdir()
    whole = make_config(tmp_path / "whole", served_checkpoint, model={"max_context_tokens": 256})
    async with deploy(whole) as running, grpc.aio.insecure_channel(running.address) as channel:
        assert cut == tokens(await answer(inference_pb2_grpc.InferenceStub(channel), asked))


class Unreachable(LocalLauncher):
    """Rank 1 is said to be where nobody listens, until it is asked to load."""

    async def start(self, key: tuple[str, int], *, epoch: int, shard: Shard) -> Started:
        started = await super().start(key, epoch=epoch, shard=shard)
        return dataclasses.replace(started, address="127.0.0.1:1") if key[1] else started


async def test_a_worker_that_cannot_be_measured_leaves_the_cut_by_threads_and_is_named(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    checked = preflight(too_large_for_each(tmp_path, served_checkpoint, 1, 3), machine=MACHINE)
    early = EarlyWorkers(Unreachable())
    try:
        measured = await early.measure(settings_of(checked))
    finally:
        await early.close()
    assert isinstance(measured[0], DeviceSpeed) and isinstance(measured[1], NotMeasured)
    settled = settle(checked, measured)
    assert settled.checked is checked and settled.checked.split_by == "threads"
    line = settled.said.pairs()
    assert line.startswith('event=auto_split by=threads cause="w1 ') and "UNAVAILABLE" in line


class Failing(LocalLauncher):
    """Rank 1 does not start."""

    async def start(self, key: tuple[str, int], *, epoch: int, shard: Shard) -> Started:
        assert shard.weight_bytes == 0, "what it will hold is not known yet"
        if key[1]:
            await asyncio.sleep(0.3)  # while the other is on its way
            raise WorkerFailed("no such device")
        return await super().start(key, epoch=epoch, shard=shard)


async def test_a_worker_that_does_not_start_fails_the_measurement_with_its_cause_and_all_end(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    launcher = Failing()
    early = EarlyWorkers(launcher)
    with pytest.raises(WorkerFailed, match=r"rank 1 of replica-0 \(worker .* on local\): no such device"):
        await early.measure(settings_of(preflight(too_large_for_each(tmp_path, served_checkpoint, 1, 1))))
    await early.close()
    left = [child for child in psutil.Process().children() if "workers" in " ".join(child.cmdline())]
    assert not left and not launcher.workers


async def test_a_worker_that_ends_after_it_was_measured_fails_the_launch(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    checked = preflight(too_large_for_each(tmp_path, served_checkpoint, 1, 1))
    launcher = LocalLauncher()
    early = EarlyWorkers(launcher)
    await early.measure(settings_of(checked))
    os.kill(launcher.workers["replica-0", 1].pid, signal.SIGKILL)
    shell = ControllerShell(launcher=early, settings=settings_of(checked))
    await shell.launch(early.epoch)
    await until(lambda: shell.state.phase is Phase.FAILED)
    assert "SIGKILL" in shell.state.cause
    await shell.shutdown(10.0)
