"""Starts one worker process, listens to it, and ends it. No Ray here, so it is tested without any."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from orchestrator.launcher.node import core_share, host_port
from orchestrator.output import OutputWriter, dropped_words
from placement.errors import HeterodyneError
from placement.measured.core_share import openmp_waits
from protos.codec.child_process import PEER_LOST_EXIT_CODE, Listening
from protos.codec.log_record import LAST_WORDS, LogRecord

# The directory that holds the packages: what `python -m workers` needs on its path.
_ROOT = Path(__file__).resolve().parents[2]
_STDERR_LINES = 20
# Limit of reading and printing what is left of a process that has ended; a child of its own may hold the pipe.
_OUTPUT_S = 1.0
# Whoever has it runs code in Ray.
_RAY_TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class WorkerFailed(HeterodyneError):
    """A worker process did not start, or ended by itself; the text is the cause, in one line."""


class HowEnded(Enum):
    """Why a worker process is no more."""

    STOPPED = "stopped"
    """It was asked to end."""
    PEER_LOST = "peer lost"
    """It ended because another rank of its replica was lost, whose own end says more."""
    FAILED = "failed"
    """It ended by itself, was killed, or its node was lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnd:
    """The end of a worker process; ``cause`` is one line for the user."""

    how: HowEnded
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerArgs:
    """How to start a worker.

    Attributes:
        bind_host: the address that it listens on; None: that of its node, which only the agent there knows.
        advertise_host: where others reach the worker, if not at ``bind_host``.
        name: what the cluster file calls the worker, under which its lines are printed.
        log_level: the least important lines that it logs.
    """

    bind_host: str | None
    device: str
    num_threads: int
    epoch: int
    advertise_host: str | None = None
    name: str = ""
    log_level: str = "info"

    @property
    def source(self) -> str:
        """Returns the source of the worker's lines."""
        return f"worker {self.name}" if self.name else "worker"

    def argv(self) -> list[str]:
        """Returns the command line."""
        assert self.bind_host is not None, "the agent says where"
        return [
            sys.executable, "-m", "workers", "--bind", host_port(self.bind_host, 0), "--device", self.device,
            "--threads", str(self.num_threads), "--epoch", str(self.epoch), "--parent-pid", str(os.getpid()),
            f"--name={self.name}", "--log-format", "json", "--log-level", self.log_level,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Returns the environment of a worker. Thread counts must be in it, as torch reads them when it is imported."""
        threads = str(self.num_threads)
        return environment() | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            **openmp_waits(core_share(self.num_threads), os.environ),
            # Large tensors on huge pages, as the KV cache is: streaming through them takes half the time.
            "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
        }


def ended_by(code: int) -> str:
    """Returns how a process ended, from its exit code, or from the negative number of the signal that killed it."""
    if code >= 0:
        return f"exited with code {code}"
    names = {number.value: number.name for number in signal.Signals}
    killed = f"was killed by {names.get(-code, f'signal {-code}')}"
    return f"{killed} (often the out-of-memory killer: see dmesg)" if -code == signal.SIGKILL else killed


def started_late(timeout_s: float) -> str:
    """Returns the cause to tell of a worker that did not come up in time."""
    return f"did not start within launch.start_timeout_s = {timeout_s:g} s; raise it, or look at the node's load"


def environment(*, ray_token: bool = False) -> dict[str, str]:
    """Returns this process's environment, with the directory of our packages first on Python's path.

    Args:
        ray_token: whether Ray's token goes along, which only a process gets that connects to Ray.
    """
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    inherited = {name: value for name, value in os.environ.items() if ray_token or name not in _RAY_TOKEN}
    return inherited | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class WorkerProcess:
    """A worker process under watch. It dies with the process that started it.

    Everything it prints is read until it ends, and passed on to standard error as records, whatever becomes of that.
    Its last words are not passed on: they are the cause of its end, which whoever waits for that is told.
    """

    def __init__(self, process: asyncio.subprocess.Process, *, host: str, source: str) -> None:
        self._process = process
        self._host = host
        self._source = source
        self._listening: asyncio.Future[Listening | None] = asyncio.get_running_loop().create_future()
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        # On an event loop nobody may wait for whoever reads standard error.
        self._written = OutputWriter(say_dropped=self._dropped)
        self._output = asyncio.create_task(self._read_all())
        self._stopping = False
        self.address = ""
        self.ranks_port = 0
        self.target = ""

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    @classmethod
    async def start(cls, args: WorkerArgs, *, timeout_s: float) -> "WorkerProcess":
        """Starts a worker and waits until it listens.

        Raises:
            WorkerFailed: it ended, or did not listen within ``timeout_s``.
        """
        process = await asyncio.create_subprocess_exec(
            *args.argv(),
            env=args.environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Signals of a terminal are for the command line, which stops workers in order.
            start_new_session=True,
        )
        assert args.bind_host is not None
        worker = cls(process, host=args.advertise_host or args.bind_host, source=args.source)
        try:
            await asyncio.wait_for(worker._listen(), timeout_s)
        except TimeoutError:
            await worker.stop(grace_s=0.0)
            raise WorkerFailed(started_late(timeout_s)) from None
        except BaseException:
            await worker.stop(grace_s=0.0)
            raise
        return worker

    async def _listen(self) -> None:
        listening = await self._listening
        if listening is None:
            raise WorkerFailed((await self.wait()).cause)
        self.address = host_port(self._host, int(listening.address.rpartition(":")[2]))
        self.ranks_port, self.target = listening.ranks_port, listening.target

    async def _read_all(self) -> None:
        try:
            await asyncio.wait([asyncio.create_task(read()) for read in (self._read_stdout, self._read_stderr)])
        finally:
            self._written.end()
        await self._written.ended()

    async def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        try:
            async for line in _lines(self._process.stdout):
                listening = None if self._listening.done() else Listening.read(line)
                if listening is None:  # a library's words
                    await self._write(self._record(line))
                else:
                    self._listening.set_result(listening)
        finally:  # whatever ends it, nobody waits for a line that does not come
            if not self._listening.done():
                self._listening.set_result(None)

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        async for line in _lines(self._process.stderr):
            record = LogRecord.read(line) or self._record(line)
            self._stderr.append(record.message)
            if record.event != LAST_WORDS:
                await self._write(record)

    async def _write(self, record: LogRecord) -> None:
        if sys.stderr is not None:
            await self._written.put_async(f"{record.line()}\n", sys.stderr)

    def _dropped(self, num_lines: int) -> str:
        words, fields = dropped_words(num_lines), {"lines": num_lines}
        record = LogRecord(
            time_s=time.time(),
            source=self._source,
            message=words,
            event="output_dropped",
            level="warning",
            fields=fields,
        )
        return f"{record.line()}\n"

    def _record(self, line: str) -> LogRecord:
        """Returns a library's words as a record."""
        return LogRecord(time_s=time.time(), source=self._source, message=line)

    async def wait(self) -> WorkerEnd:
        """Waits for the end of the process and says how it came."""
        code = await self._process.wait()
        await asyncio.wait([self._output], timeout=_OUTPUT_S)
        if self._stopping:
            return WorkerEnd(how=HowEnded.STOPPED, cause="stopped")
        last = next((line for line in reversed(self._stderr) if line.strip()), "")
        if code == PEER_LOST_EXIT_CODE:
            cause = f"another rank of its replica was lost: {last.removeprefix('lost ')}"
            return WorkerEnd(how=HowEnded.PEER_LOST, cause=cause)
        cause = f"worker process {self.pid} {ended_by(code)}" + (f": {last}" if last and code >= 0 else "")
        return WorkerEnd(how=HowEnded.FAILED, cause=cause)

    async def stop(self, *, grace_s: float) -> None:
        """Ends the process with SIGTERM, and with SIGKILL after ``grace_s`` (at once when 0)."""
        self._stopping = True
        if self._process.returncode is None and grace_s > 0:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yields the lines of a stream until it ends, but for those longer than the reader's buffer."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # too long: what was read of it is dropped
            continue
        if not line:
            return
        yield line.decode(errors="replace").rstrip()
