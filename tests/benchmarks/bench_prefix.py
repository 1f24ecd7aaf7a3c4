"""Decode steps of 64 sequences that share a prefix, with and without shared-prefix attention (Hydragen).

The whole step of a model of the 1.1 B Llama shape with random weights: attention, projections, head, sampling. Run with
``make bench-prefix``; ``--layers`` and ``--sequences`` make a small one, ``--kv-heads 32`` one in which every query
head has keys and values of its own (multi-head attention), so that there is eight times as much to read.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.attention import SharedSpan
from kernels.select import kernels_for
from placement.model.hf import read_model_spec
from placement.model.specs import ModelSpec
from placement.model.weights import whole_model
from tests.benchmarks.report import Curve, Metric, Report, Rows, publish, shown
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.sampling.sampling import SamplerState, SamplingParams
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput, StepResult

PREFIXES = (1024, 2048, 4096, 8192, 16384)
COMPARED = 4096
SUFFIX = 128
OUTPUT = Path("build/bench/prefix.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A batch whose sequences share their first ``prefix`` tokens, each with ``SUFFIX`` of its own."""

    runner: ModelRunner
    num_sequences: int

    def step(self, prefix: int, *, shares: bool) -> Callable[[], StepResult]:
        """The next decode of every sequence, ready to execute."""
        shared = SharedSpan(
            members=tuple(range(self.num_sequences)), first_token=0, num_tokens=prefix, runs=((0, prefix),)
        )
        sequences = tuple(self._sequence(prefix, i) for i in range(self.num_sequences))
        return self.runner.prepare(Batch(sequences=sequences, shared=(shared,) if shares else ()))

    def _sequence(self, prefix: int, number: int) -> SequenceInput:
        start = max(PREFIXES) + number * SUFFIX
        return SequenceInput(
            token_ids=[number],
            start=prefix + SUFFIX - 1,
            runs=((0, prefix), (start, start + SUFFIX)),
            sampler=SamplerState(SamplingParams(), ()),
            samples=True,
        )

    def seconds(self, prefix: int, *, shares: bool) -> float:
        step = self.step(prefix, shares=shares)
        began = time.perf_counter()
        step()
        return time.perf_counter() - began


def llama_spec(num_layers: int, num_kv_heads: int) -> ModelSpec:
    """The 1.1 B shape, of so many layers and KV heads."""
    return read_model_spec(
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 32,
            "num_key_value_heads": num_kv_heads,
            "intermediate_size": 5632,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }
    )


def make_case(*, num_layers: int, num_kv_heads: int, num_sequences: int, num_threads: int) -> Case:
    """A runner with random weights and a cache full of random keys and values."""
    device, spec = open_device("cpu", num_threads), llama_spec(num_layers, num_kv_heads)
    torch.manual_seed(0)
    weights = {slice_.name: torch.randn(slice_.shape, dtype=torch.bfloat16) * 0.02 for slice_ in whole_model(spec)}
    num_slots = max(PREFIXES) + num_sequences * SUFFIX
    cache = allocate_kv_cache(spec, num_slots=num_slots, dtype=torch.bfloat16, device=device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    runner = ModelRunner(
        model=spec, weights=weights, cache=cache, device=device.torch_device, kernels=kernels_for("cpu")
    )
    return Case(runner=runner, num_sequences=num_sequences)


def measure(case: Case, repeats: int) -> dict[tuple[int, bool], list[float]]:
    """Seconds of a step by prefix and by whether it is shared; the variants take turns."""
    samples: dict[tuple[int, bool], list[float]] = {}
    variants = [(prefix, True) for prefix in PREFIXES] + [(COMPARED, False)]
    for repeat in range(repeats + 1):
        for prefix, shares in variants:
            seconds = case.seconds(prefix, shares=shares)
            if repeat:  # the first round warms up
                samples.setdefault((prefix, shares), []).append(seconds)
        print(f"round {repeat} of {repeats}", flush=True)
    return samples


def _ratio(above: Sequence[float], below: Sequence[float], unit: str = "x", less: float = 0.0) -> Metric:
    """Median of the ratios of rounds, and their range."""
    ratios = [a / b - less for a, b in zip(above, below, strict=True)]
    return Metric(value=statistics.median(ratios), unit=unit, samples=len(ratios), spread=(min(ratios), max(ratios)))


def make_report(samples: dict[tuple[int, bool], list[float]], *, settings: dict[str, int]) -> Report:
    """The figures of the issue: what sharing gains at 4096 tokens, what 16 times the prefix costs."""
    gain = _ratio(samples[COMPARED, False], samples[COMPARED, True])
    growth = _ratio(samples[max(PREFIXES), True], samples[min(PREFIXES), True], less=1.0)
    rows = [
        (str(prefix), "yes" if shares else "no", f"{1e3 * statistics.median(times):.1f}", f"{1e3 * min(times):.1f}")
        for (prefix, shares), times in sorted(samples.items())
    ]
    line = [(float(prefix), 1e3 * statistics.median(samples[prefix, True])) for prefix in PREFIXES]
    return Report(
        name="prefix",
        headline=f"shared_gain {shown(gain)}; growth_cost {100 * growth.value:.0f}% from {min(PREFIXES)} to"
        f" {max(PREFIXES)} tokens",
        metrics={"shared_gain": gain, "growth_cost": growth},
        tables=[Rows(title="decode step", columns=("prefix", "shared", "median ms", "least ms"), rows=rows)],
        curves=[
            Curve(
                title=f"Decode step of {settings['sequences']} sequences over a shared prefix",
                x_label="tokens of the prefix",
                y_label="ms",
                lines={"shared-prefix attention": line},
            )
        ],
        settings=settings,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--kv-heads", type=int, choices=(4, 8, 16, 32), default=4)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report."""
    args = parse(argv)
    load = os.getloadavg()
    case = make_case(
        num_layers=args.layers,
        num_kv_heads=args.kv_heads,
        num_sequences=args.sequences,
        num_threads=args.threads,
    )
    settings = {name: getattr(args, name) for name in ("layers", "kv_heads", "sequences", "threads", "repeats")}
    publish(make_report(measure(case, args.repeats), settings=settings), load_at_start=load, output=args.output)


if __name__ == "__main__":
    main()
