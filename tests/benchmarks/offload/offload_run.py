"""Runs the benchmark of offloaded attention: a model rank and an attention worker on emulated hosts of a core each.

Without offloading one process has both cores. The relay that carries the packets takes time of the same cores.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import grpc
import psutil

from orchestrator.launcher.process import WorkerArgs
from placement.model.specs import DType, ModelSpec
from placement.serving.offload.work import DecodeWork
from protos.codec.child_process import Listening
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc
from tests.benchmarks.engine.engine_models import checkpoint, read_spec
from tests.benchmarks.offload import offload_figures as figures
from tests.benchmarks.offload.offload_arms import Arm, Ask, Sample
from tests.benchmarks.offload.offload_driver import AT, BLOCK_SIZE, READY, SECRET
from tests.benchmarks.offload.offload_figures import Point, Speeds
from tests.benchmarks.offload.offload_sizes import DELAY_S, RATE_BITS_PER_S, Sizes
from tests.benchmarks.parallel.parallel_figures import Findings
from tests.benchmarks.report import REPOSITORY, Metric
from tests.netlab.lab import Host, Lab, lab
from tests.netlab.specs import HostSpec, LinkConditions
from tests.support.deploying.service import Command

SHORT = 16
"""Tokens of a context that is read in next to no time."""
_START_S = 180.0
_KV_BYTES = 8 << 30
_EPOCH = 41


class Decodes:
    """A process that decodes as one arm says."""

    def __init__(self, arm: Arm, child: "subprocess.Popen[str]") -> None:
        self.arm = arm
        self._child = child
        assert child.stdin is not None and child.stdout is not None
        line = child.stdout.readline().strip()
        if line != READY:
            raise RuntimeError(f"{arm.name} did not get ready: {line}")

    def sample(self, *, batch: int, context: int, steps: int) -> Sample:
        """Has it measure a batch."""
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(asdict(Ask(arm=self.arm.name, batch=batch, context=context, steps=steps))) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self.arm.name} ended: {self._child.wait(10)}")
        return Sample.read(json.loads(line))

    def close(self) -> None:
        """Ends the process."""
        self._child.terminate()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """The emulated cluster, and where the attention worker listens on it."""

    net: Lab
    address: str
    port: int

    def set_delay(self, delay_s: float) -> None:
        """Changes the delay of the link."""
        self.net.change(LinkConditions(delay_s=delay_s, rate_bits_per_s=RATE_BITS_PER_S))


@contextmanager
def hosts() -> Iterator[Hosts]:
    """Two hosts, with an attention worker on the second, for the length of the block. Needs root."""
    conditions = LinkConditions(delay_s=DELAY_S, rate_bits_per_s=RATE_BITS_PER_S)
    with (
        lab(HostSpec(name="model", core=0), HostSpec(name="attention", core=1), conditions=conditions) as net,
        _attention_worker(net["attention"]) as port,
    ):
        yield Hosts(net=net, address=net["attention"].address, port=port)


@contextmanager
def _attention_worker(host: Host) -> Iterator[int]:
    """A worker process on a host that holds keys and values; yields the port where model ranks connect."""
    args = WorkerArgs(bind_host=host.address, device="cpu", num_threads=1, epoch=_EPOCH)
    with Command(host.command(args.argv()), env=args.environment()) as command:
        listening = Listening.read(command.wait_for(r'\{"event": "listening".*\}', _START_S)[0])
        assert listening is not None
        argv = [sys.executable, "-m", "tests.benchmarks.offload.offload_run", listening.address]
        host.run(argv, timeout_s=_START_S, cwd=REPOSITORY)
        yield listening.ranks_port


def load_attention(address: str) -> None:
    """Has a worker become an attention worker. Runs on its host."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        load = pb.AttentionLoad(kv_cache_bytes=_KV_BYTES, secret=SECRET, dtypes=[pb.DTYPE_BFLOAT16], head_dim=64)
        request = pb.LoadRequest(epoch=_EPOCH, attention=load)
        for _ in worker_pb2_grpc.WorkerStub(channel).Load(request, timeout=_START_S):
            pass


@contextmanager
def decodes(arms: Sequence[Arm], at: Hosts) -> Iterator[Mapping[str, Decodes]]:
    """The processes of some arms for the length of the block."""
    with ExitStack() as stack:
        found = {}
        for arm in arms:
            argv = [sys.executable, "-m", AT, json.dumps(asdict(arm))]
            if arm.is_offloaded or arm.threads == 1:
                argv = at.net["model"].command(argv)
            child = subprocess.Popen(argv, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)
            stack.callback(child.kill)
            found[arm.name] = Decodes(arm, child)
            stack.callback(found[arm.name].close)
        yield found


def arms_of(sizes: Sizes, shape: str, at: Hosts) -> list[Arm]:
    """Returns the arms of a shape: alone with two threads and with one, and offloaded in three ways."""
    tokens = sizes.most_sequences * (max(sizes.contexts) + BLOCK_SIZE)
    held = max(sizes.fitting(sizes.held, context) * (context + BLOCK_SIZE) for context in (*sizes.contexts, SHORT))
    num_blocks = -(-min(tokens, held) // BLOCK_SIZE) + sizes.most_sequences
    place = {"shape": shape, "num_blocks": num_blocks}
    remote = place | {"threads": 1, "host": at.address, "port": at.port}
    return [
        Arm(name="alone", threads=2, **place),
        Arm(name="one thread", threads=1, **place),
        Arm(name="offloaded", epoch=1, **remote),
    ]


def _turns(sizes: Sizes, asked: Sequence[tuple[Decodes, int, int]]) -> list[list[Sample]]:
    """Measures all that is asked for, as decoder, batch and context, in turn in each repeat."""
    found: list[list[Sample]] = [[] for _ in asked]
    for _ in range(sizes.repeats):
        for place, (decoder, batch, context) in enumerate(asked):
            found[place].append(decoder.sample(batch=batch, context=context, steps=sizes.steps))
    return found


def measure_gain(sizes: Sizes) -> Findings:
    """Measures what an attention worker brings, at one context and then by context and delay."""
    model = read_spec(checkpoint(sizes.shape))
    with hosts() as at:
        relay = psutil.Process(at.net.relay_pid)
        before, start_s = sum(relay.cpu_times()[:2]), time.monotonic()
        with decodes(arms_of(sizes, sizes.shape, at), at) as by_name:
            alone, offloaded = by_name["alone"], by_name["offloaded"]
            few, many = sizes.fitting(sizes.capped, sizes.context), sizes.fitting(sizes.held, sizes.context)
            below, above = _turns(sizes, [(alone, few, sizes.context), (offloaded, many, sizes.context)])
            metrics, curves, table = _sweep(sizes, model, by_name, at)
        share = (sum(relay.cpu_times()[:2]) - before) / (time.monotonic() - start_s)
    found = {"gain_2048": figures.gain(above, below), "wire_bytes_over_formula": figures.wire_share(model, above)}
    tables = [figures.samples_table([("alone, both cores", below), ("offloaded", above)]), table]
    settings = {
        "link": f"{RATE_BITS_PER_S:g} bit/s, {1e3 * DELAY_S:g} ms one way, by a relay in user space",
        "relay_core_share": round(share, 3),
    }
    return Findings(metrics=found | metrics, tables=tables, curves=curves, settings=settings)


def _sweep(
    sizes: Sizes, model: ModelSpec, by_name: Mapping[str, Decodes], at: Hosts
) -> tuple[dict[str, Metric], list[figures.Curve], figures.Rows]:
    """Measures and predicts the gain by context and delay."""
    alone, one, offloaded = by_name["alone"], by_name["one thread"], by_name["offloaded"]
    work = DecodeWork.of(model, DType.BFLOAT16)
    both, single = _speeds(sizes, work, alone, sizes.capped), _speeds(sizes, work, one, sizes.held)
    lone = _turns(sizes, [(offloaded, 1, SHORT)])[0]
    overhead_s = figures.overhead_s(work, single, lone)
    measured: dict[Point, float] = {}
    predicted: dict[Point, float] = {}
    for delay_s in sizes.delays_s:
        at.set_delay(delay_s)
        for context in sizes.contexts:
            pair = [(alone, sizes.fitting(sizes.capped, context)), (offloaded, sizes.fitting(sizes.held, context))]
            below, above = _turns(sizes, [(decoder, batch, context) for decoder, batch in pair])
            measured[context, delay_s] = figures.gain(above, below).value
            predicted[context, delay_s] = figures.predicted_gain(
                model, sizes, alone=both, offloaded=single, overhead_s=overhead_s, context=context, delay_s=delay_s
            )
    at.set_delay(DELAY_S)
    return (
        {"prediction_error_max": figures.largest_error(measured, predicted)},
        figures.sweep_curves(measured, predicted),
        figures.sweep_table(measured, predicted),
    )


def _speeds(sizes: Sizes, work: DecodeWork, decoder: Decodes, most: int) -> Speeds:
    """Measures how fast a process computes, and attends to as many sequences as it will: more than caches hold."""
    batches = sorted({1, 2, 4, 8, sizes.most_sequences // 2, sizes.most_sequences} & set(range(1, 1025)))
    batches = [batch for batch in batches if batch <= sizes.most_sequences]
    fitting = max(batch for batch in batches if batch <= sizes.fitting(most, sizes.context))
    samples = _turns(sizes, [*((decoder, batch, SHORT) for batch in batches), (decoder, fitting, sizes.context)])
    return figures.speeds(work, [it for found in samples[:-1] for it in found], samples[-1])


def measure_overlap(sizes: Sizes) -> Findings:
    """Measures what it brings that queries go first, and that two micro-batches take turns."""
    metrics: dict[str, Metric] = {}
    named: list[tuple[str, list[Sample]]] = []
    with hosts() as at:
        for num_queries, shape in sizes.group_shapes:
            ways = _ways(sizes, shape, at, name=f"g{num_queries}", q_first=(True, False), staggered=(False,))
            with decodes(ways, at) as by_name:
                asked = [(decoder, sizes.group_batch, sizes.group_context) for decoder in by_name.values()]
                first, together = _turns(sizes, asked)
            metrics[f"q_first_gain_g{num_queries}"] = figures.gain(first, together)
            named += [(f"{shape}, queries first", first), (f"{shape}, all at once", together)]
        with decodes(
            _ways(sizes, sizes.shape, at, name="turns", q_first=(False,), staggered=(True, False)), at
        ) as by_name:
            batch = sizes.fitting(sizes.held, sizes.context)
            turns, plain = _turns(sizes, [(decoder, batch, sizes.context) for decoder in by_name.values()])
    metrics["staggered_gain"] = figures.gain(turns, plain)
    named += [("two micro-batches", turns), ("one", plain)]
    return Findings(metrics=metrics, tables=[figures.samples_table(named)])


def _ways(
    sizes: Sizes, shape: str, at: Hosts, *, name: str, q_first: Sequence[bool], staggered: Sequence[bool]
) -> list[Arm]:
    """Returns an offloaded arm for each combination; all have sessions of their own."""
    batch = sizes.fitting(sizes.held, sizes.context)
    blocks = max(batch * -(-(sizes.context + 1) // BLOCK_SIZE), sizes.group_batch * (sizes.group_context // 16 + 1))
    return [
        Arm(
            name=f"{name} {first} {turns}", shape=shape, threads=1, num_blocks=blocks, host=at.address, port=at.port,
            epoch=1, q_first=first, staggered=turns,
        )
        for first in q_first
        for turns in staggered
    ]  # fmt: skip


if __name__ == "__main__":
    load_attention(sys.argv[1])
