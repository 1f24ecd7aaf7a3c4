"""The controller around real worker processes: what it is told, what it tells, what it leaves."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from orchestrator.controller.control import start_control_server
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.controller.shell import ControllerShell
from orchestrator.controller.state import Phase
from orchestrator.deployment.preflight import preflight
from orchestrator.launcher.agent import Started
from orchestrator.launcher.process import WorkerEnd, WorkerFailed
from placement.planning.memory import CPU_PROCESS_BYTES
from placement.planning.plan import Shard
from protos.heterodyne.control.v1 import control_pb2 as pb
from protos.heterodyne.control.v1 import control_pb2_grpc
from protos.heterodyne.worker.v1 import worker_pb2, worker_pb2_grpc
from tests.support.clocks import PATIENCE_S, until
from tests.support.deploying.deployment import LocalLauncher, make_config, two_ranks


def make_shell(
    tmp_path: Path,
    model: Path,
    count: int = 1,
    *,
    launcher: LocalLauncher | None = None,
    load_timeout_s: float = 60.0,
    **sections: Mapping[str, object],
) -> tuple[ControllerShell, LocalLauncher]:
    sections = sections or {"cluster": {"workers": [{"device": "cpu", "count": count}]}}
    config = make_config(tmp_path, model, **sections)
    checked = preflight(config)
    launcher = launcher or LocalLauncher()
    settings = DeploymentSettings(
        plan=checked.plan,
        model_path=config.model.path,
        load_timeout_s=load_timeout_s,
    )
    return ControllerShell(launcher=launcher, settings=settings), launcher


@pytest.mark.parametrize(
    ("sections", "who"),
    [({}, "rank 0 of replica-[01]"), (two_ranks(), "rank [01] of replica-0")],
    ids=["two replicas", "two ranks"],
)
async def test_weights_that_rot_after_the_checks_fail_the_launch_with_the_ranks_own_words(
    served_checkpoint: Path, tmp_path: Path, sections: dict[str, dict[str, object]], who: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(served_checkpoint, model)
    shell, launcher = make_shell(tmp_path, model, count=2, **sections)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    await shell.launch()
    await until(lambda: shell.state.phase is Phase.FAILED)
    assert re.match(f"{who} \\(worker worker-[01] on here\\): ", shell.state.cause)
    assert "model.safetensors" in shell.state.cause
    await until(
        lambda: len(launcher.workers) == 2 and all(not psutil.pid_exists(w.pid) for w in launcher.workers.values())
    )
    await shell.shutdown(10.0)


async def test_watch_tells_the_whole_course_from_start_to_stop(served_checkpoint: Path, tmp_path: Path) -> None:
    shell, launcher = make_shell(tmp_path, served_checkpoint)
    server, address = await start_control_server(shell, "127.0.0.1")
    seen: list[pb.WatchResponse] = []

    async def watch() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            async for state in control_pb2_grpc.ControlStub(channel).Watch(pb.WatchRequest()):
                seen.append(state)

    watching = asyncio.create_task(watch())
    await shell.launch()
    await until(lambda: shell.state.phase is Phase.READY)
    pid = launcher.workers["replica-0", 0].pid
    await shell.shutdown(10.0)
    await until(lambda: bool(seen) and seen[-1].phase == pb.PHASE_STOPPED)
    watching.cancel()
    await server.stop(0.1)
    versions = [state.version for state in seen]
    assert versions == sorted(set(versions))
    phases = [state.phase for state in seen]
    order = [pb.PHASE_STARTING, pb.PHASE_LOADING, pb.PHASE_READY, pb.PHASE_DRAINING, pb.PHASE_STOPPED]
    assert [phase for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase] == order
    ready = next(state for state in seen if state.phase == pb.PHASE_READY)
    (rank,) = ready.replicas[0].ranks
    assert (rank.pid, rank.loaded_bytes) == (pid, rank.weight_bytes)
    assert not psutil.pid_exists(pid)


async def test_a_report_of_an_old_epoch_is_ignored(served_checkpoint: Path, tmp_path: Path) -> None:
    shell, _ = make_shell(tmp_path, served_checkpoint)
    await shell.launch()
    await until(lambda: shell.state.phase is Phase.READY)
    (replica,) = shell.state.replicas
    await shell.report_lost(replica.name, replica.epoch - 1, "an old gateway says so")
    assert shell.state.phase is Phase.READY
    await shell.report_lost(replica.name, replica.epoch, "no heartbeat for 2 s")
    assert shell.state.phase is Phase.FAILED
    assert "no heartbeat for 2 s" in shell.state.cause
    await shell.shutdown(10.0)


class FakeLauncher(LocalLauncher):
    """Starts nothing: its starts never end, or its stops raise."""

    def __init__(self, *, stop_error: Exception | None = None) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._stop_error = stop_error

    async def start(self, key: tuple[str, int], *, epoch: int, shard: Shard) -> Started:
        self.calls.append("start")
        try:
            await asyncio.sleep(3600.0)
        finally:
            self.calls.append("start cancelled")
        raise AssertionError

    async def stop(self, key: tuple[str, int]) -> None:
        self.calls.append("stop")
        if self._stop_error is not None:
            raise self._stop_error

    async def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize(
    ("error", "cause", "num_tracebacks"),
    [(WorkerFailed("no node has 1 free CPU"), "no node has 1 free CPU", 0), (KeyError("x"), "KeyError: 'x'", 1)],
)
async def test_a_cluster_without_room_is_said_in_words_and_what_is_not_expected_once(
    served_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception, cause: str,
    num_tracebacks: int,
) -> None:  # fmt: skip
    class Full(LocalLauncher):
        async def reserve(self, shards: Mapping[tuple[str, int], Shard]) -> None:
            raise error

    shell, _ = make_shell(tmp_path, served_checkpoint, 2, launcher=Full())
    await shell.launch()
    await until(lambda: shell.state.phase is Phase.FAILED)
    assert shell.state.cause.endswith(cause)
    assert sum(record.exc_info is not None for record in caplog.records) == num_tracebacks
    await shell.shutdown(10.0)


async def test_shutdown_ends_what_is_starting_before_it_closes_the_launcher(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    launcher = FakeLauncher()
    shell, _ = make_shell(tmp_path, served_checkpoint, launcher=launcher)
    await shell.launch()
    await until(lambda: launcher.calls == ["start"])
    await shell.shutdown(10.0)
    assert launcher.calls == ["start", "start cancelled", "stop", "close"]
    assert shell.state.phase is Phase.STOPPED


async def test_a_rank_whose_stop_raises_counts_as_stopped(
    served_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = FakeLauncher(stop_error=ConnectionError("the node is gone"))
    shell, _ = make_shell(tmp_path, served_checkpoint, launcher=launcher)
    await shell.launch()
    async with asyncio.timeout(PATIENCE_S):
        await shell.shutdown(2 * PATIENCE_S)
    assert shell.state.phase is Phase.STOPPED
    assert "the node is gone" in caplog.text


class Late(FakeLauncher):
    """Rank 1 does not start, and rank 0 comes up once it is let, whether it is still wanted or not."""

    def __init__(self) -> None:
        super().__init__()
        self.let = asyncio.Event()

    async def start(self, key: tuple[str, int], *, epoch: int, shard: Shard) -> Started:
        if key[1]:
            raise WorkerFailed("no such device")
        await self.let.wait()
        self.calls.append("up")
        return Started(node="here", address="127.0.0.1:1", ranks_port=1, pid=0)

    async def wait(self, key: tuple[str, int]) -> WorkerEnd:
        await asyncio.sleep(3600.0)
        raise AssertionError


async def test_a_worker_that_comes_up_after_it_was_stopped_is_stopped_again(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    launcher = Late()
    shell, _ = make_shell(tmp_path, served_checkpoint, launcher=launcher, **two_ranks())
    await shell.launch()
    await until(lambda: shell.state.phase is Phase.FAILED and launcher.calls == ["stop", "stop"])
    launcher.let.set()
    await until(lambda: launcher.calls == ["stop", "stop", "up", "stop"])
    assert shell.state.cause == "rank 1 of replica-0 (worker worker-1 on local): no such device"
    await shell.shutdown(10.0)


class Unwatched(LocalLauncher):
    """Loses sight of its worker once it serves: to wait for its end raises."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = asyncio.Event()

    async def wait(self, key: tuple[str, int]) -> WorkerEnd:
        await self.lost.wait()
        raise ConnectionError("nobody knows how it is")


async def test_a_worker_that_cannot_be_followed_has_failed_and_is_stopped(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    launcher = Unwatched()
    shell, _ = make_shell(tmp_path, served_checkpoint, launcher=launcher)
    await shell.launch()
    await until(lambda: shell.state.phase is Phase.READY)
    pid = launcher.workers["replica-0", 0].pid
    launcher.lost.set()
    await until(lambda: shell.state.phase is Phase.FAILED)
    assert "nobody knows how it is" in shell.state.cause
    await until(lambda: not psutil.pid_exists(pid))
    await shell.shutdown(10.0)


async def test_a_process_is_followed_once_for_as_long_as_it_lives(served_checkpoint: Path, tmp_path: Path) -> None:
    waits = []

    class Counting(LocalLauncher):
        async def wait(self, key: tuple[str, int]) -> WorkerEnd:
            waits.append(key)
            return await super().wait(key)

    launcher = Counting()
    shell, _ = make_shell(tmp_path, served_checkpoint, launcher=launcher)
    await shell.launch()
    await until(lambda: shell.state.phase is Phase.READY)
    psutil.Process(launcher.workers["replica-0", 0].pid).kill()
    await until(lambda: shell.state.phase is Phase.FAILED)
    assert "was killed by SIGKILL" in shell.state.cause and waits == [("replica-0", 0)]
    await shell.shutdown(10.0)
    assert waits == [("replica-0", 0)]


class Silent(FakeLauncher, worker_pb2_grpc.WorkerServicer):
    """Its worker answers a request to load with nothing."""

    address = ""

    async def start(self, key: tuple[str, int], *, epoch: int, shard: Shard) -> Started:
        return Started(node="here", address=self.address, ranks_port=1, pid=0)

    async def wait(self, key: tuple[str, int]) -> WorkerEnd:
        await asyncio.sleep(3600.0)
        raise AssertionError

    async def Load(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.LoadResponse]:
        for _ in ():
            yield worker_pb2.LoadResponse()


async def test_a_worker_that_ends_its_answer_before_it_has_loaded_has_failed(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    launcher = Silent()
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(launcher, server)
    launcher.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    shell, _ = make_shell(tmp_path, served_checkpoint, launcher=launcher)
    await shell.launch()
    await until(lambda: shell.state.phase is Phase.FAILED)
    assert shell.state.cause.endswith("ended its answer before it had loaded")
    await shell.shutdown(10.0)
    await server.stop(0.1)


async def test_a_load_that_takes_too_long_names_its_limit(served_checkpoint: Path, tmp_path: Path) -> None:
    shell, _ = make_shell(tmp_path, served_checkpoint, load_timeout_s=0.001)
    await shell.launch()
    await until(lambda: shell.state.phase is Phase.FAILED)
    assert shell.state.cause.endswith("did not load within launch.load_timeout_s = 0.001 s; raise it or check the disk")
    await shell.shutdown(10.0)


def test_a_rank_needs_more_than_its_weights_and_kv_blocks(served_checkpoint: Path, tmp_path: Path) -> None:
    needed = []
    for token_budget in (64, 4096):
        plan = preflight(make_config(tmp_path, served_checkpoint, serving={"token_budget": token_budget})).plan
        settings = DeploymentSettings(
            plan=plan,
            model_path="",
            load_timeout_s=60.0,
        )
        shard = plan.replicas[0].leader
        needed.append(settings.needed_bytes(shard))
        assert needed[-1] > shard.weight_bytes + shard.kv_bytes + CPU_PROCESS_BYTES
    assert needed[1] > needed[0]
