"""One worker process: started, listened to, ended. No Ray here, so it is tested without any."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from orchestrator.launcher.node import host_port
from placement.errors import PEER_LOST_EXIT_CODE, HeterodyneError

# The directory that holds the packages: what `python -m workers` needs on its path.
_ROOT = Path(__file__).resolve().parents[2]
_STDERR_LINES = 20
# Whoever has it runs code in Ray.
_RAY_TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
PEER_LOST = "another rank of its replica was lost"
"""How the cause begins of a worker that ended because another did: the other's own cause says more."""


class WorkerFailed(HeterodyneError):
    """The worker process did not start, or ended by itself; the text is its cause, one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerArgs:
    """How to start a worker.

    Attributes:
        advertise_host: where others reach it, if not at ``bind_host``.
    """

    bind_host: str
    device: str
    num_threads: int
    epoch: int
    advertise_host: str | None = None

    def argv(self) -> list[str]:
        """The command line."""
        return [
            sys.executable, "-m", "workers", "--bind", host_port(self.bind_host, 0), "--device", self.device,
            "--threads", str(self.num_threads), "--epoch", str(self.epoch), "--parent-pid", str(os.getpid()),
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """What a worker runs with: the thread counts count from before torch is imported."""
        threads = str(self.num_threads)
        # OpenMP's threads wait for work by spinning, by default so long that on a machine which also does other work
        # they take each other's cores; this is long enough to bridge the gap between two operations of a step.
        spin = os.environ.get("GOMP_SPINCOUNT", "1000")
        return environment() | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "GOMP_SPINCOUNT": spin,
            # Large tensors, the KV cache among them, on huge pages: streaming through them takes half the time.
            "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
        }


def started_late(timeout_s: float) -> str:
    """The cause of a worker that did not come up in time."""
    return f"did not start within launch.start_timeout_s = {timeout_s:g} s; raise it, or look at the node's load"


def environment(*, ray_token: bool = False) -> dict[str, str]:
    """This process's environment, with the directory of our packages first on the path.

    Args:
        ray_token: whether Ray's token goes along, which only a process gets that connects to Ray.
    """
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    inherited = {name: value for name, value in os.environ.items() if ray_token or name not in _RAY_TOKEN}
    return inherited | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class WorkerProcess:
    """A worker under watch. It dies with the process that started it."""

    def __init__(self, process: asyncio.subprocess.Process, host: str) -> None:
        self._process = process
        self._host = host
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._pump = asyncio.create_task(self._read_stderr())
        self._stopping = False
        self.address = ""
        self.ranks_port = 0

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @classmethod
    async def start(cls, args: WorkerArgs, *, timeout_s: float) -> "WorkerProcess":
        """Start it and wait until it listens.

        Raises:
            WorkerFailed: it ended, or said nothing within ``timeout_s``.
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
        worker = cls(process, args.advertise_host or args.bind_host)
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
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise WorkerFailed(await self.wait())
        said = json.loads(line)
        self.address = host_port(self._host, int(said["address"].rpartition(":")[2]))
        self.ranks_port = int(said["ranks_port"])

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while True:
            try:
                line = await self._process.stderr.readline()
            except ValueError:  # longer than the reader's buffer: what was read of it is dropped
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._stderr.append(text)
            print(text, file=sys.stderr, flush=True)

    async def wait(self) -> str:
        """Wait for the end and say, in one line, how it came."""
        code = await self._process.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._pump, 1.0)
        if self._stopping:
            return "stopped"
        last = next((line for line in reversed(self._stderr) if line.strip()), "")
        if code == PEER_LOST_EXIT_CODE:
            return f"{PEER_LOST}: {last.removeprefix('lost ')}"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"worker process {self.pid} {how}" + (f": {last}" if last and code >= 0 else "")

    async def stop(self, *, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after ``grace_s`` (at once when 0)."""
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
