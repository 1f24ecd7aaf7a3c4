"""Two emulated hosts of one core each, a process on each that holds bare ranks, and the replicas that they make.

The relay that carries packets between them takes time of the same cores: what it takes is a part of every figure.
"""

import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from placement.planning.layout import Split
from tests.benchmarks.parallel.hosts.parallel_wire import Lanes, Opening, Run
from tests.benchmarks.parallel.parallel_steps import Workload
from tests.benchmarks.parallel.parallel_sums import Sums
from tests.benchmarks.report import REPOSITORY
from tests.netlab.lab import Host, Lab, lab
from tests.netlab.relay import DEVICE
from tests.netlab.specs import HostSpec, LinkConditions
from workers.transport.mesh import TOKEN_BYTES

RATE_BITS_PER_S = 1e9
BLOCK_SIZE = 16
_OPEN_S = 600.0
_RUN_S = 600.0
_ANSWER_S = 60.0


class RankFailed(Exception):
    """A process of ranks ended, did not answer in time, or says that a command failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How two hosts hold a model.

    Attributes:
        name: for people.
        hosts: where each rank runs: 0 or 1.
        stages: the shares of the ranks of each stage.
    """

    name: str
    stages: tuple[tuple[float, ...], ...]
    hosts: tuple[int, ...] = (0, 1)
    split: Split = "tensor"

    def __post_init__(self) -> None:
        assert sum(map(len, self.stages)) == len(self.hosts), self


def alone(host: int) -> Plan:
    """The whole model on one host."""
    return Plan(name=f"host {host} alone", stages=((1.0,),), hosts=(host,))


TENSOR = Plan(name="tensor", stages=((1.0, 1.0),))
PIPELINE = Plan(name="pipeline", stages=((1.0,), (1.0,)))
SEQUENCE = Plan(name="sequence", stages=((1.0, 1.0),), split="sequence")


class RankProcess:
    """The process on a host."""

    def __init__(self, host: Host) -> None:
        self._name = host.spec.name
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": DEVICE}
        self._process = host.popen(
            [sys.executable, "-m", "tests.benchmarks.parallel.hosts.parallel_rank", str(os.getpid()), host.address],
            cwd=REPOSITORY,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._heard = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def tell(self, command: str, told: Mapping[str, Any]) -> None:
        """Says something; the answer is to be heard before the next. Raises RankFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({command: told}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RankFailed(f"{self._name}: ended with {self._process.poll()}; its words are above") from None

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """The answer. Raises RankFailed."""
        assert self._process.stdout is not None
        number, deadline_s = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._heard:
            if not select.select([number], (), (), max(0.0, deadline_s - time.monotonic()))[0]:
                raise RankFailed(f"{self._name}: no answer within {timeout_s:g} s")
            came = os.read(number, 65_536)
            if not came:
                raise RankFailed(f"{self._name}: ended; its words are above")
            self._heard += came
        line, _, self._heard = self._heard.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RankFailed(f"{self._name}: {answer['error']}")
        return answer

    def ask(self, command: str, told: Mapping[str, Any], timeout_s: float = _ANSWER_S) -> dict[str, Any]:
        """Both. Raises RankFailed."""
        self.tell(command, told)
        return self.hear(timeout_s)


class Replica:
    """A model that is held by the hosts' processes as a plan says.

    Attributes:
        measured: what the leader says that its ranks measured: ``sums``, ``overlap`` and ``sharing``.
    """

    def __init__(self, key: str, plan: Plan, processes: Sequence[RankProcess], measured: Mapping[str, str]) -> None:
        """``processes``: of the ranks, in their order."""
        self._key = key
        self.plan = plan
        self._processes = processes
        self._lanes: Lanes = "measured"
        self.measured = measured

    def seconds(self, workload: Workload, *, lanes: Lanes = "measured", exchange: str | None = None) -> float:
        """Of a workload; of decodes, of each step of a sequence. Raises RankFailed."""
        self._set_lanes(lanes)
        run = Run(key=self._key, workload=workload, exchange=exchange)
        answer = self._processes[0].ask("run", asdict(run), _RUN_S)
        return float(answer["seconds"]) / workload.num_timed

    def choice(self, workload: Workload) -> dict[str, Any]:
        """How the leader would have it computed: ``exchange`` and ``is_woven``. Raises RankFailed."""
        self._set_lanes("measured")
        return self._processes[0].ask("choose", asdict(Run(key=self._key, workload=workload)))

    def _set_lanes(self, lanes: Lanes) -> None:
        if lanes != self._lanes:
            for process in self._processes:
                process.ask("lanes", {"key": self._key, "lanes": lanes})
            self._lanes = lanes

    def set_sums(self, way: Sums) -> None:
        """Who sums from now on. Raises RankFailed."""
        for process in self._processes:
            process.ask("sums", {"key": self._key, "way": way.value})

    def close(self) -> None:
        """Frees its memory. Raises RankFailed."""
        for process in reversed(self._processes):
            process.ask("close", {"key": self._key})


class Cluster:
    """The hosts, their processes, and the links between them."""

    def __init__(self, net: Lab, hosts: Sequence[Host], directory: Path) -> None:
        """``directory``: for files by which processes meet."""
        self.net = net
        self._hosts = hosts
        self._processes = [RankProcess(host) for host in hosts]
        self._directory = directory
        self._num_opened = 0
        self._has_gloo = False

    @property
    def pids(self) -> list[int]:
        """Of the processes, by host."""
        return [process.pid for process in self._processes]

    def set_delay(self, delay_s: float) -> None:
        """One way, from now on. Replicas that are open keep what they measured before."""
        self.net.change(LinkConditions(delay_s=delay_s, rate_bits_per_s=RATE_BITS_PER_S))

    @contextmanager
    def replica(self, model: Path, plan: Plan, *, num_slots: int, token_budget: int = 512) -> Iterator[Replica]:
        """Open for the length of the block.

        Args:
            num_slots: of its KV cache.
            token_budget: up to which ranks measure what they choose by.

        Raises:
            RankFailed: it cannot be loaded.
        """
        processes = [self._processes[host] for host in plan.hosts]
        ports = [process.ask("listen", {})["port"] for process in processes]
        key = f"{plan.name} {self._num_opened}"
        self._num_opened += 1
        token = secrets.token_hex(TOKEN_BYTES)
        for rank, process in enumerate(processes):
            opening = Opening(
                key=key,
                model=str(model.absolute()),
                stages=[list(weights) for weights in plan.stages],
                split=plan.split,
                rank=rank,
                addresses=[(self._hosts[host].address, port) for host, port in zip(plan.hosts, ports, strict=True)],
                token=token,
                block_size=BLOCK_SIZE,
                num_slots=-(-num_slots // BLOCK_SIZE) * BLOCK_SIZE,
                token_budget=token_budget,
            )
            process.tell("open", asdict(opening))
        measured, *_ = [process.hear(_OPEN_S) for process in processes]
        replica = Replica(key, plan, processes, measured)
        print(f"open: {plan.name}", *(f"{name} {text}" for name, text in measured.items() if text), flush=True)
        yield replica
        replica.close()  # not after a failure, when the processes end

    def join_gloo(self) -> None:
        """Connects the processes by gloo, once. Raises RankFailed."""
        if self._has_gloo:
            return
        for rank, process in enumerate(self._processes):
            meeting = str(self._directory / "gloo")
            process.tell("gloo", {"meeting": meeting, "rank": rank, "num_ranks": len(self._processes)})
        for process in self._processes:
            process.hear(_ANSWER_S)
        self._has_gloo = True


@contextmanager
def cluster(*, slow_share: float | None = None) -> Iterator[Cluster]:
    """Two hosts for the length of the block.

    Args:
        slow_share: of a core's time, that the second host has; None: all of it.
    """
    specs = (HostSpec(name="one", core=0), HostSpec(name="two", core=1, cpu_share=slow_share))
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory, lab(*specs) as net:
        yield Cluster(net, [net["one"], net["two"]], Path(directory))
