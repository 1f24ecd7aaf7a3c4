"""A deployment that is measured: ``serve`` with a configuration of its own, workers that may be slow, and requests."""

import asyncio
import contextlib
import itertools
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import yaml

from kernels.cpu.machine.target import VARIABLE
from orchestrator.cli.client import CHANNEL_OPTIONS
from orchestrator.cli.replay.idle import measure_idle
from orchestrator.cli.replay.outcome import Outcome
from orchestrator.cli.replay.prompts import Prompts, make_request
from orchestrator.cli.replay.schedule import PlannedRequest, Schedule
from orchestrator.cli.replay.sending import Sender
from orchestrator.cli.replay.slo import IdlePoint
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from tests.benchmarks.engine.engine_models import checkpoint, read_spec
from tests.netlab import system
from tests.support.deploying.service import Command

REQUEST_S = 900.0
MAX_NUM_SEQS = 32
_START_S = 180.0
_STATUS_S = 10.0
_MOST_IN_FLIGHT = 4096
_SERVES = r"event=serving .*address=(\S+)"
# What is left to run between the turns of a deployment: it is idle, and its parts keep each other's pulse.
_LEFT_RUNNING = re.compile(r"workers|orchestrator\.gateway(\..*)?")
_GATEWAY = re.compile(r"orchestrator\.gateway")
_numbers = itertools.count()
# One event loop for all calls, since gRPC's threads do not let go of the first.
_runner = asyncio.Runner()

# `serve` whose gateway takes all replicas to be equally fast, whatever it measures, so that it goes by tokens.
_SERVE_BY_TOKENS = """
import subprocess
from types import SimpleNamespace
from orchestrator.__main__ import app
from orchestrator.deployment import gateway_process

GATEWAY = '''
import sys
from orchestrator.gateway import __main__ as gateway
from placement.serving.routing.router import Router
Router.stepped = lambda *_, **__: None
sys.exit(gateway.main())
'''

def start(argv, **options):
    assert argv[1:3] == ["-m", "orchestrator.gateway"], argv
    return subprocess.Popen([argv[0], "-c", GATEWAY, *argv[3:]], **options)

gateway_process.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": start})
app()
"""

# What Python runs first in every process of a deployment, the workers among them.
_SITE = """
import os
import sys

for name, target in {targets!r}.items():
    if f"--name={{name}}" in sys.orig_argv:
        os.environ[{variable!r}] = target
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A deployment as it is asked for.

    Attributes:
        workers: how many threads each has, by its name. Each is a replica.
        serving: the section of the configuration.
        by_tokens: whether its gateway counts all replicas as equally fast.
        targets: the kind of CPU that a worker's code is compiled for, by its name, where it is not the best.
    """

    name: str
    workers: Mapping[str, int]
    serving: Mapping[str, Any] = field(default_factory=dict)
    by_tokens: bool = False
    targets: Mapping[str, str] = field(default_factory=dict)

    def content(self, shape: str, kv_cache: str) -> dict[str, Any]:
        """Returns the configuration."""
        return {
            "model": {"path": str(checkpoint(shape).absolute()), "dtype": "bfloat16"},
            "cluster": {
                "ray_address": "local",
                "workers": [
                    {"name": name, "device": "cpu", "threads": threads} for name, threads in self.workers.items()
                ],
            },
            "serving": {"max_num_seqs": MAX_NUM_SEQS, "kv_cache": kv_cache, "prefix_cache": False} | dict(self.serving),
            "gateway": {"address": "127.0.0.1:0", "request_timeout_s": REQUEST_S},
            "telemetry": {"prometheus_address": None},
        }


def split(prompts: str = "one", answers: str = "two", *, disaggregation: str = "always") -> dict[str, Any]:
    """Returns the part of the configuration by which a worker is for prompts, and another for answers.

    With ``always`` each computes nothing else; with ``auto`` they help each other where that is expected to be faster.
    """
    pools = {"prefill": {"workers": [prompts]}, "decode": {"workers": [answers]}}
    return {"disaggregation": disaggregation, "pools": pools}


MIXED: Mapping[str, Any] = {"disaggregation": "never"}


class Served:
    """A deployment that serves. All of it but gateway and workers is frozen except in its turns."""

    def __init__(self, arm: Arm, command: Command, address: str, vocab_size: int) -> None:
        self.arm = arm
        self.address = address
        self._command = command
        self._vocab_size = vocab_size
        self._groups: list[Path] = []
        top = psutil.Process(command.process.pid)
        self._processes = [(process, process.cmdline()) for process in (top, *top.children(recursive=True))]

    def output(self) -> str:
        """Returns what it has said."""
        return self._command.output()

    def status(self) -> admin_pb2.GetStatusResponse:
        """Returns what its gateway says of it."""
        with self.turn(), grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            return admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=_STATUS_S)

    def num_failed_transfers(self) -> int:
        """Returns how many prompts were computed again, as their keys and values did not come."""
        return sum(replica.load.kv_failures for replica in self.status().replicas)

    def steps(self, worker: str) -> dict[int, float]:
        """Returns the seconds of a worker's steps by their tokens, as it measured them when it started."""
        return {step.num_tokens: step.duration_s for step in self._replica(worker).budget.steps}

    def _replica(self, worker: str) -> admin_pb2.ReplicaStatus:
        (found,) = [replica for replica in self.status().replicas if replica.ranks[0].worker == worker]
        return found

    def slow_down(self, worker: str, share: float) -> None:
        """Leaves a worker this share of one core's time, by a cgroup. ``close`` removes the group."""
        name = f"{system.PREFIX}-{os.getpid()}-{next(_numbers)}-{worker}"
        group = system.add_cpu_group(name, share)
        self._groups.append(group)
        (group / "cgroup.procs").write_text(str(self._replica(worker).ranks[0].pid))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Has all of it run for the length of the block."""
        self._each(psutil.Process.resume)
        try:
            yield
        finally:
            self.freeze()

    def freeze(self) -> None:
        """Stops all that need not run between turns."""
        self._each(psutil.Process.suspend)

    def _each(self, act: Any) -> None:
        for process, words in self._processes:
            if not any(_LEFT_RUNNING.fullmatch(word) or _GATEWAY.search(word) for word in words):
                with contextlib.suppress(psutil.NoSuchProcess):
                    act(process)

    def close(self) -> None:
        """Stops it and sees that nothing of it is left."""
        self._each(psutil.Process.resume)
        try:
            self._command.stop_cleanly()
        finally:
            self._command.close()
            for group in self._groups:
                system.delete_cpu_group(group)

    def send(
        self, requests: Sequence[PlannedRequest], *, seed: int, for_s: float | None = None, drops: bool = False
    ) -> list[Outcome]:
        """Sends requests when they are due, in a turn, and returns what became of them.

        Args:
            for_s: when all that still runs is cancelled; None: it may end.
            drops: whether a request may fail.

        Raises:
            RuntimeError: one of them failed, and none may.
        """
        with self.turn():
            outcomes = _runner.run(self._send(requests, seed, for_s))
        failed = [it for it in outcomes if not it.is_completed and not it.is_stopped]
        if failed and not drops:
            print(self.output(), file=sys.stderr, flush=True)
            raise RuntimeError(f"{self.arm.name}: {len(failed)} requests failed: {failed[0].code} {failed[0].detail}")
        return sorted(outcomes, key=lambda outcome: outcome.index)

    async def _send(self, requests: Sequence[PlannedRequest], seed: int, for_s: float | None) -> list[Outcome]:
        schedule = Schedule(requests=tuple(requests), num_clipped=0, shared_tokens=0)
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            sender = Sender(stub, schedule, self._make(seed), timeout_s=REQUEST_S, max_in_flight=_MOST_IN_FLIGHT)
            running = asyncio.create_task(sender.run())
            await asyncio.wait({running}, timeout=for_s)
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
            return sender.outcomes

    def idle(self, requests: Sequence[PlannedRequest], *, seed: int) -> tuple[IdlePoint, ...]:
        """Returns what requests take that come one after the other, in a turn."""
        with self.turn():
            return _runner.run(self._idle(requests, seed))

    async def _idle(self, requests: Sequence[PlannedRequest], seed: int) -> tuple[IdlePoint, ...]:
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            return await measure_idle(stub, requests, self._make(seed), timeout_s=REQUEST_S)

    def _make(self, seed: int) -> Any:
        prompts = Prompts(seed=seed, vocab_size=self._vocab_size)
        return partial(make_request, prompts=prompts, cache_salt=secrets.token_hex(8))


@contextmanager
def served(*arms: Arm, shape: str, kv_cache: str) -> Iterator[list[Served]]:
    """Deployments for the length of the block. They start one after the other, as they measure their steps then."""
    vocab_size = read_spec(checkpoint(shape)).vocab_size
    with tempfile.TemporaryDirectory(prefix="split-") as directory, ExitStack() as stack:
        deployments = []
        for number, arm in enumerate(arms):
            path = Path(directory) / f"{number}.yaml"
            path.write_text(yaml.safe_dump(arm.content(shape, kv_cache)))
            start = ["-c", _SERVE_BY_TOKENS] if arm.by_tokens else ["-m", "orchestrator"]
            env = _environment(arm, Path(directory) / f"{number}")
            command = stack.enter_context(Command([sys.executable, *start, "serve", str(path)], env=env))
            deployment = Served(arm, command, command.wait_for(_SERVES, _START_S)[1], vocab_size)
            stack.callback(deployment.close)
            deployment.freeze()
            deployments.append(deployment)
        yield deployments


def _environment(arm: Arm, directory: Path) -> dict[str, str]:
    """Returns what the processes of a deployment have in their environment, beside what this one has."""
    if not arm.targets:
        return {}
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(_SITE.format(targets=dict(arm.targets), variable=VARIABLE))
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH", "")]))}
