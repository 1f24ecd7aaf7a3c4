"""A worker process under watch, whatever it prints and however it ends."""

import asyncio
import dataclasses
import os
import signal
import sys
import time

import pytest

from orchestrator.launcher import process
from orchestrator.launcher.process import HowEnded, WorkerArgs, WorkerFailed, WorkerProcess, ended_by
from placement.measured.core_share import CoreShare
from protos.codec.child_process import PEER_LOST_EXIT_CODE, Listening
from protos.codec.log_record import LAST_WORDS, LogRecord
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.lost_stderr import Loss, lost_stderr

# More than any pipe holds; a million of it is one line.
CHATTER = "print('NCCL INFO ring 0', *['x' * 80] * 50_000, sep=chr(10)); print('y' * 1_000_000);"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Child(WorkerArgs):
    """A process that is no worker."""

    code: str

    def argv(self) -> list[str]:
        return [sys.executable, "-c", self.code]


async def start(code: str) -> WorkerProcess:
    args = Child(bind_host="127.0.0.1", device="cpu", num_threads=1, epoch=1, code=code, name="big")
    return await WorkerProcess.start(args, timeout_s=PATIENCE_S)


def says(address: str = "0.0.0.0:7000") -> str:
    return f"print({Listening(address=address, ranks_port=7001, pid=os.getpid()).line()!r}, flush=True);"


async def test_what_a_library_prints_before_and_after_never_stops_a_worker(capfd: pytest.CaptureFixture[str]) -> None:
    worker = await start(f"{CHATTER} {says()} {CHATTER} print('the last', flush=True); raise SystemExit(5)")
    assert (worker.address, worker.ranks_port) == ("127.0.0.1:7000", 7001)
    end = await asyncio.wait_for(worker.wait(), PATIENCE_S)
    assert end.how is HowEnded.FAILED and end.cause.endswith("exited with code 5")
    logged = capfd.readouterr().err
    records = [LogRecord.read(line) for line in logged.splitlines()]
    assert None not in records and {record.source for record in records if record} == {"worker big"}
    assert logged.count("NCCL INFO ring 0") == 2 and records[-1] and records[-1].message == "the last"
    assert "listening" not in logged


@pytest.mark.parametrize("loss", list(Loss))
async def test_a_standard_error_that_is_lost_stops_no_worker_and_nobody_beside_it(loss: Loss) -> None:
    slowest_s = 0.0

    async def look() -> None:
        nonlocal slowest_s
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(0.01)
            slowest_s = max(slowest_s, time.monotonic() - before_s)

    with lost_stderr(loss):
        looking = asyncio.create_task(look())
        # Of both streams, before and after.
        chatter = f"{CHATTER} import sys; sys.stdout = sys.stderr; {CHATTER} sys.stdout = sys.__stdout__;"
        worker = await start(f"{chatter} {says()} {chatter} raise SystemExit(5)")
        end = await asyncio.wait_for(worker.wait(), PATIENCE_S)
        looking.cancel()
    assert (worker.address, end.how) == ("127.0.0.1:7000", HowEnded.FAILED)
    assert "exited with code 5" in end.cause
    assert slowest_s < PATIENCE_S / 10


async def test_a_second_worker_line_is_only_words() -> None:
    worker = await start(f"{says()} {says('127.0.0.1:9')}")
    await asyncio.wait_for(worker.wait(), PATIENCE_S)
    assert worker.address == "127.0.0.1:7000"


async def test_who_ends_before_it_listens_has_failed_with_its_last_words() -> None:
    with pytest.raises(WorkerFailed, match=r"exited with code 1: no such device$"):
        await start("import sys; print('hello'); print('no such device', file=sys.stderr); sys.exit(1)")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was killed by SIGKILL (often the out-of-memory killer: see dmesg)"),
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),  # of those for real time, which have no names
    ],
)
def test_an_exit_code_is_put_in_words(code: int, words: str) -> None:
    assert ended_by(code) == words


async def test_a_worker_that_is_killed_from_outside_says_so_with_the_usual_reason() -> None:
    worker = await start(f"{says()} import time; time.sleep(600)")
    os.kill(worker.pid, signal.SIGKILL)
    end = await asyncio.wait_for(worker.wait(), PATIENCE_S)
    assert end.how is HowEnded.FAILED and end.cause.endswith("(often the out-of-memory killer: see dmesg)")


async def test_how_it_ended_is_no_matter_of_words() -> None:
    lost = await start(
        f"{says()} import sys; sys.stderr.write('lost rank 1: stopped'); sys.exit({PEER_LOST_EXIT_CODE})"
    )
    end = await asyncio.wait_for(lost.wait(), PATIENCE_S)
    assert (end.how, end.cause) == (HowEnded.PEER_LOST, "another rank of its replica was lost: rank 1: stopped")
    stopped = await start(f"{says()} import time; time.sleep(600)")
    await stopped.stop(grace_s=PATIENCE_S)
    assert (await stopped.wait()).how is HowEnded.STOPPED
    says_stopped = await start(f"{says()} import sys; sys.stderr.write('stopped'); sys.exit(1)")
    assert (await asyncio.wait_for(says_stopped.wait(), PATIENCE_S)).how is HowEnded.FAILED


async def test_last_words_are_the_cause_and_not_printed_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    said = LogRecord(time_s=0.0, source="worker", message="It goes on.", event="e").line()
    last = LogRecord(time_s=0.0, source="worker", message="error: no GPU", event=LAST_WORDS).line()
    worker = await start(f"{says()} import sys; print({said!r}, {last!r}, sep=chr(10), file=sys.stderr); sys.exit(2)")
    end = await asyncio.wait_for(worker.wait(), PATIENCE_S)
    assert end.cause.endswith("exited with code 2: error: no GPU")
    logged = capfd.readouterr().err
    assert "It goes on." in logged and "no GPU" not in logged


async def test_who_was_killed_outright_is_said_to_have_been_so_often_for_want_of_memory() -> None:
    worker = await start(f"{says()} import os; os.kill(os.getpid(), 9)")
    cause = (await asyncio.wait_for(worker.wait(), PATIENCE_S)).cause
    assert cause.endswith("was killed by SIGKILL (often the out-of-memory killer: see dmesg)")


async def test_a_worker_with_a_wrong_cpu_target_ends_with_one_line_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HETERODYNE_CPU_TARGET", "avx3")
    args = WorkerArgs(bind_host="127.0.0.1", device="cpu", num_threads=1, epoch=1)
    with pytest.raises(WorkerFailed) as caught:
        await WorkerProcess.start(args, timeout_s=PATIENCE_S)
    cause = str(caught.value)
    assert "exited with code 2: error: environment variable HETERODYNE_CPU_TARGET: 'avx3' is not a target" in cause
    assert "Traceback" not in cause and len(cause.splitlines()) == 1


@pytest.mark.parametrize(
    ("num_threads", "waits"),
    [
        (2, {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": None, "KMP_BLOCKTIME": None}),
        (3, {"GOMP_SPINCOUNT": None, "OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}),
    ],
)
def test_a_worker_with_more_threads_than_cores_starts_with_threads_that_wait_asleep(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, waits: dict[str, str | None]
) -> None:
    for name in waits:
        monkeypatch.delenv(name, raising=False)
    share = CoreShare(num_threads=num_threads, usable_cores=2)
    monkeypatch.setattr(process, "core_share", lambda count: share)
    environment = WorkerArgs(bind_host="127.0.0.1", device="cpu", num_threads=num_threads, epoch=1).environment()
    assert {name: environment.get(name) for name in waits} == waits
    assert environment["OMP_NUM_THREADS"] == str(num_threads)
