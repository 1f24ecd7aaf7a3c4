"""``make bench-quantization``: what rounding the linear layers to 8 or 4 bits costs in quality and gives in speed.

Quality: perplexity of the demo model on ``deploy/demo/heldout.txt``, cut as ``deploy/demo/train.py --evaluate`` cuts
it, and the mean Kullback-Leibler divergence of its next tokens from those of the float32 model. The demo model knows
some books by heart and is unsure of these, so blurring its weights may even lower the perplexity; the divergence
cannot fall below 0. Speed: one matrix of the 1.1 B Llama shape, in as many copies as do not fit a cache, the forms
interleaved call by call; ratios are medians of pairs, by the CPU time of the calling thread.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from kernels.cpu.products.linear import pack
from kernels.linear import Linear
from kernels.rounded import round_weight
from kernels.select import kernels_for, pack_rounded
from placement.model.hf import read_model_spec
from placement.model.quantization import LinearFormat, Quantization, linear_format, loaded_bytes
from placement.model.specs import DType, ModelSpec
from placement.model.weights import whole_model
from tests.benchmarks.report import REPOSITORY, RESULTS, Curve, Metric, Report, Rows, publish, shown
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.startup.checkpoint import load_weights
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput

DEMO = REPOSITORY / "deploy" / "demo"
END_OF_TEXT = "<|end_of_text|>"
PIECE = 1024  # tokens that are predicted from one another
FORMS = {"bf16": Quantization.NONE, "int8": Quantization.INT8, "int4": Quantization.INT4}
SHAPE = (5632, 2048)
GROUP_SIZE = 128
TOKENS = (1, 4, 8, 16, 64, 256)
NUM_COPIES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one form of the model makes of the text: perplexity, and divergence in nats a token."""

    perplexity: float
    divergence: float


def read_pieces(directory: Path) -> list[list[int]]:
    """The token ids of the held-out text, in pieces of at most 1025 that overlap by one."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    text = (directory / "heldout.txt").read_text()
    documents = [part for part in text.split(f"\n{END_OF_TEXT}\n") if part]
    tokens = [[*tokenizer.encode(document).ids, end] for document in documents]
    return [ids[start : start + PIECE + 1] for ids in tokens for start in range(0, len(ids) - 1, PIECE)]


def load_runner(directory: Path, model: ModelSpec, linear: LinearFormat | None, dtype: torch.dtype) -> ModelRunner:
    """The model with its linear layers held as ``linear`` says."""
    device = open_device("cpu", torch.get_num_threads())
    return ModelRunner(
        model=model,
        weights=load_weights(directory, whole_model(model), dtype, device.torch_device, lambda *_: None, linear),
        cache=allocate_kv_cache(model, num_slots=PIECE, dtype=dtype, device=device),
        device=device.torch_device,
        kernels=kernels_for("cpu"),
    )


def log_probabilities(runner: ModelRunner, pieces: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of every next token in each piece, [tokens, V] in float32."""
    steps = [SequenceInput(token_ids=piece[:-1], start=0, runs=((0, len(piece) - 1),)) for piece in pieces]
    return [runner.logits(Batch(sequences=(step,))).float().log_softmax(-1) for step in steps]


def judge(found: Sequence[Tensor], exact: Sequence[Tensor], pieces: Sequence[Sequence[int]]) -> Quality:
    """Perplexity of ``found``, and its divergence from ``exact``."""
    targets = [torch.tensor(piece[1:]) for piece in pieces]
    num_tokens = sum(len(target) for target in targets)
    loss = sum(functional.nll_loss(x, t, reduction="sum").item() for x, t in zip(found, targets, strict=True))
    divergence = sum(((e - f) * e.exp()).sum().item() for f, e in zip(found, exact, strict=True))
    return Quality(perplexity=math.exp(loss / num_tokens), divergence=divergence / num_tokens)


def measure_quality(directory: Path) -> dict[str, Metric]:
    """Perplexity, divergence and bytes of each form."""
    config = json.loads((directory / "config.json").read_text())
    model, pieces = read_model_spec(config), read_pieces(directory)
    exact = log_probabilities(load_runner(directory, model, None, torch.float32), pieces)
    metrics: dict[str, Metric] = {}
    for name, quantization in FORMS.items():
        linear = linear_format(config, quantization)
        found = log_probabilities(load_runner(directory, model, linear, torch.bfloat16), pieces)
        quality = judge(found, exact, pieces)
        num_bytes = loaded_bytes(whole_model(model), DType.BFLOAT16, linear)
        samples = sum(len(piece) - 1 for piece in pieces)
        metrics[f"perplexity_{name}"] = Metric(value=quality.perplexity, unit="", samples=samples)
        metrics[f"divergence_{name}"] = Metric(value=quality.divergence, unit="nats", samples=samples)
        metrics[f"weight_bytes_{name}"] = Metric(value=num_bytes, unit="bytes")
    return metrics


def make_layers(shape: tuple[int, int], num_copies: int) -> dict[str, list[Linear]]:
    """The same matrix in each form, in copies that are read in turn."""
    weight = torch.randn(shape).bfloat16()
    rounded = {bits: round_weight(weight, bits=bits, group_size=GROUP_SIZE) for bits in (8, 4)}
    return {
        "bf16": [pack(weight, None) for _ in range(num_copies)],
        "int8": [pack_rounded(rounded[8], None, torch.bfloat16) for _ in range(num_copies)],
        "int4": [pack_rounded(rounded[4], None, torch.bfloat16) for _ in range(num_copies)],
    }


def measure_speed(layers: Mapping[str, Sequence[Linear]], num_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of CPU time of each call of each form, the forms in turn; the first round does not count."""
    num_inputs = SHAPE[1]
    x = torch.randn(num_tokens, num_inputs).bfloat16()
    taken: dict[str, list[float]] = {name: [] for name in layers}
    for round_number in range(repeats + 1):
        for copy in range(len(layers["bf16"])):
            for name, copies in layers.items():
                started = time.thread_time()
                copies[copy](x)
                if round_number:
                    taken[name].append(time.thread_time() - started)
    return taken


def speed_metrics(num_tokens: int, taken: Mapping[str, list[float]]) -> dict[str, Metric]:
    """Times of the forms, and how much faster than bfloat16 they are."""
    metrics: dict[str, Metric] = {}
    for name, times in taken.items():
        rate = 2 * SHAPE[0] * SHAPE[1] / statistics.median(times) / 1e9
        metrics[f"{name}_gb_per_s_m{num_tokens}"] = Metric(value=rate, unit="GB/s", samples=len(times))
        if name != "bf16":
            pairs = sorted(plain / ours for plain, ours in zip(taken["bf16"], times, strict=True))
            low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
            gain = Metric(value=middle, unit="x", samples=len(pairs), spread=(low, high))
            metrics[f"{name}_gain_m{num_tokens}"] = gain
    return metrics


def tables(metrics: Mapping[str, Metric]) -> list[Rows]:
    """The metrics for people."""
    quality = [
        [
            name,
            f"{metrics[f'perplexity_{name}'].value:.1f}",
            f"{metrics[f'divergence_{name}'].value:.4f}",
            f"{metrics[f'weight_bytes_{name}'].value / 2**20:.2f}",
        ]
        for name in FORMS
    ]
    speed = [
        [
            str(m),
            *(f"{metrics[f'{name}_gb_per_s_m{m}'].value:.1f}" for name in FORMS),
            *(shown(metrics[f"{name}_gain_m{m}"]) for name in FORMS if name != "bf16"),
        ]
        for m in TOKENS
    ]
    title = f"product {SHAPE[0]} x {SHAPE[1]}: bfloat16 bytes over time, GB/s; gain over bf16 (middle half)"
    return [
        Rows(title="demo model", columns=["weights", "perplexity", "divergence", "MiB"], rows=quality),
        Rows(title=title, columns=["tokens", *FORMS, "int8 gain", "int4 gain"], rows=speed),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument(
        "--copies", type=int, default=NUM_COPIES, help="fewer may fit a cache: only to see that it runs"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "quantization.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, write build/bench/quantization.json."""
    options = parse(argv)
    torch.set_num_threads(1)
    load_at_start = os.getloadavg()
    metrics = measure_quality(DEMO)
    layers = make_layers(SHAPE, options.copies)
    for num_tokens in TOKENS:
        metrics |= speed_metrics(num_tokens, measure_speed(layers, num_tokens, options.repeats))
    lines = {name: [(m, metrics[f"{name}_gb_per_s_m{m}"].value) for m in TOKENS] for name in FORMS}
    perplexities = ", ".join(f"{name} {metrics[f'perplexity_{name}'].value:.1f}" for name in FORMS)
    gains = " and ".join(f"{metrics[f'{name}_gain_m1'].value:.2f}x ({name})" for name in ("int8", "int4"))
    report = Report(
        name="quantization",
        headline=f"perplexity {perplexities}; one token's product {gains} as fast as bf16",
        metrics=metrics,
        tables=tables(metrics),
        curves=[Curve(title="product", x_label="tokens", y_label="bfloat16 GB/s", lines=lines)],
        settings={"repeats": options.repeats, "copies": NUM_COPIES, "threads": 1},
    )
    publish(report, load_at_start=load_at_start, output=options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
