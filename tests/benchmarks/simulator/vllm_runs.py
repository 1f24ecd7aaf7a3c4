"""Reads measured runs of vLLM, and has the same requests served in virtual time by our scheduler."""

import csv
import gzip
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from placement.planning.limits import ReplicaLimits
from placement.serving.admission import Limits
from placement.serving.settings import CoreSettings
from placement.serving.step_plan import SchedulerLimits
from placement.simulation.dispatch import OnlyReplica
from placement.simulation.layer_times import AllReduces, LayeredSteps, LayerTimes
from placement.simulation.load import OpenLoop, Request
from placement.simulation.replica import AT_ONCE_S, SimulatedReplica
from placement.simulation.results import Result, summary
from placement.simulation.simulation import Fleet, Simulation
from placement.simulation.tables import Table

_ONCE = ("embedding", "final_layernorm")
_TWICE = ("layernorm",)
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is public of a model."""

    num_layers: int
    hidden_size: int
    kv_bytes_per_token: int
    weight_bytes: int


MODELS = {
    "meta-llama/Llama-3.1-8B": Model(
        num_layers=32, hidden_size=4096, kv_bytes_per_token=131072, weight_bytes=16_060_522_496
    ),
    "Qwen/Qwen3-32B": Model(num_layers=64, hidden_size=5120, kv_bytes_per_token=262144, weight_bytes=65_524_246_528),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRequest:
    """A request of a measured run; times are seconds since the first came."""

    arrived_s: float
    first_s: float
    last_s: float
    prompt_tokens: int
    answer_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrived_s

    @property
    def latency_s(self) -> float:
        return self.last_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / (self.answer_tokens - 1) if self.answer_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A measured run of vLLM."""

    name: str
    times: LayerTimes
    requests: tuple[MeasuredRequest, ...]
    settings: CoreSettings
    sums: AllReduces | None


def read_run(folder: Path) -> Run:
    """Reads a run with its settings and the profile of its layers."""
    meta, config = (json.loads((folder / name).read_text()) for name in ("meta.json", "config.json"))
    kwargs = meta["engine_kwargs"]
    instance = config["nodes"][0]["instances"][0]
    model = MODELS[meta["model"]]
    memory = instance["npu_mem"]
    num_gpus = instance["num_npus"]
    room = memory["mem_size"] * 2**30 * memory["mem_util"] * num_gpus - model.weight_bytes
    settings = CoreSettings(
        limits=Limits(max_context_tokens=1 << 20, vocab_size=1 << 31, block_size=_BLOCK_SIZE),
        steps=SchedulerLimits(token_budget=kwargs["max_num_batched_tokens"], max_num_seqs=kwargs["max_num_seqs"]),
        num_blocks=int(room / model.kv_bytes_per_token / _BLOCK_SIZE),
    )
    sums = AllReduces(
        num_ranks=num_gpus,
        per_step=2 * model.num_layers,
        bytes_per_token=2 * model.hidden_size,
        latency_s=config["link_latency"] * 1e-9,
        bytes_per_s=config["link_bw"] * 1e9,
    )
    return Run(
        name=folder.name,
        times=read_profile(folder / "profile", model.num_layers),
        requests=_read_requests(folder / "requests.jsonl.gz"),
        settings=settings,
        sums=sums if num_gpus > 1 else None,
    )


def _read_requests(path: Path) -> tuple[MeasuredRequest, ...]:
    """The clients' clock is not the engine's: the request that was taken soonest after it came says how they differ."""
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    shift_s = min(row["queued_ts"] - row["arrival_time"] for row in rows)
    origin_s = min(row["arrival_time"] for row in rows)
    return tuple(
        MeasuredRequest(
            arrived_s=row["arrival_time"] - origin_s,
            first_s=row["first_token_ts"] - shift_s - origin_s,
            last_s=row["last_token_ts"] - shift_s - origin_s,
            prompt_tokens=row["input_toks"],
            answer_tokens=row["output_toks"],
        )
        for row in rows
    )


def read_profile(folder: Path, num_layers: int) -> LayerTimes:
    """Reads the profile of a model's layers, whose times are in microseconds."""
    dense: dict[int, float] = defaultdict(float)
    for row in _rows(folder / "dense.csv.gz"):
        count = 1 if row["layer"] in _ONCE else num_layers * (2 if row["layer"] in _TWICE else 1)
        dense[int(row["tokens"])] += count * float(row["time_us"]) * 1e-6
    sampled: dict[int, float] = defaultdict(float)
    for row in _rows(folder / "per_sequence.csv.gz"):
        sampled[int(row["sequences"])] += float(row["time_us"]) * 1e-6
    axes = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    attention = [
        (tuple(float(row[name]) for name in axes), float(row["time_us"]) * 1e-6)
        for row in _rows(folder / "attention.csv.gz")
    ]
    return LayerTimes(
        num_layers=num_layers,
        dense=Table([((at,), value) for at, value in dense.items()]),
        per_sequence=Table([((at,), value) for at, value in sampled.items()]),
        attention=Table(attention),
    )


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(gzip.decompress(path.read_bytes()).decode().splitlines()))


def simulate(run: Run, step_s: float) -> Result:
    """Serves the requests of a run as vLLM does: a step is planned as soon as the one before last has ended."""
    steps = LayeredSteps(run.times, step_s=step_s, sums=run.sums)
    replica = SimulatedReplica(name="vllm", settings=run.settings, steps=steps, lead_s=AT_ONCE_S)
    limits = ReplicaLimits(
        block_size=_BLOCK_SIZE,
        token_budget=run.settings.steps.token_budget,
        max_num_seqs=run.settings.steps.max_num_seqs,
    )
    requests = [
        Request(
            number=number,
            at_s=measured.arrived_s,
            prompt_tokens=measured.prompt_tokens,
            answer_tokens=measured.answer_tokens,
        )
        for number, measured in enumerate(run.requests)
    ]
    return Simulation(Fleet(replicas=[replica]), OpenLoop(requests), OnlyReplica("vllm", limits)).run()


def errors(run: Run, result: Result) -> dict[str, float]:
    """Returns by how much the simulated times differ from the measured ones, as a share, by their names."""
    found: dict[str, float] = {}
    for name in ("ttft", "tpot", "latency"):
        measured = [getattr(it, f"{name}_s") for it in run.requests if it.answer_tokens > 1]
        simulated = [getattr(it, f"{name}_s") for it in result.outcomes if it.answer_tokens > 1]
        one, other = summary(measured), summary(simulated)
        found[f"{name}_mean"] = other.mean / one.mean - 1.0
        found[f"{name}_p99"] = other.p99 / one.p99 - 1.0
    return found


def fit(run: Run) -> float:
    """Fits the seconds of a step that no layer's profile has to a run, so that the squares of all errors are least.

    The errors grow about linearly with it, so two rounds of Gauss and Newton's method are enough.
    """
    step_s, delta_s = 0.5e-3, 0.25e-3
    for _ in range(2):
        here, there = (np.array(list(errors(run, simulate(run, at)).values())) for at in (step_s, step_s + delta_s))
        slope = (there - here) / delta_s
        step_s = max(0.0, step_s - float(slope @ here) / float(slope @ slope))
    return step_s
