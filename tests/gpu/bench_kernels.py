"""Triton's kernels as shares of what the GPU copies and multiplies, and a model of 8 B parameters beside transformers.

    PYTHONPATH=. python tests/gpu/bench_kernels.py

writes tests/gpu/results/<date>.json, in the form of all benchmarks.
"""

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from tests.benchmarks.report import Metric, Report, Rows, publish, shown
from tests.gpu import kernel_loads, model_loads
from tests.gpu.timing import Ceilings, measure_ceilings, seconds, share, spread
from tests.support.triton.triton_cases import DEVICE, HAS_GPU

RESULTS = Path(__file__).parent / "results"


def kernel_metrics(sizes: kernel_loads.Sizes, ceilings: Ceilings, repeats: int) -> dict[str, Metric]:
    """The share of each kernel, and its time."""
    metrics: dict[str, Metric] = {}
    for load in kernel_loads.loads(sizes):
        taken = seconds(load.call, repeats)
        ceiling = ceilings.bytes_per_s if load.bound_by == "bytes" else ceilings.flops_per_s
        metrics[f"{load.name}_share"] = share(load.amount, taken, ceiling)
        metrics[f"{load.name}_us"] = spread([1e6 * one for one in taken], "us")
    return metrics


def our_metrics(sizes: model_loads.ModelSizes, ceilings: Ceilings, repeats: int) -> dict[str, Metric]:
    """Steps of our decoder: tokens a second, and shares of the ceiling that bounds them."""
    model = model_loads.OurModel(sizes)
    metrics: dict[str, Metric] = {}
    for batch in sizes.batches:
        arms = {"": model.decode, "_eager": model.eager_decode, "_laid_out": model.laid_out_decode}
        taken = {arm: seconds(make(batch), repeats) for arm, make in arms.items()}
        for arm, samples in taken.items():
            metrics[f"decode{arm}_tokens_per_s_b{batch}"] = spread([batch / one for one in samples], "tokens/s")
        moved = model.read_bytes + batch * sizes.context * model.kv_bytes_per_token
        metrics[f"decode_share_b{batch}"] = share(moved, taken[""], ceilings.bytes_per_s)
    taken_s = seconds(model.prefill(), repeats)
    metrics["prefill_tokens_per_s"] = spread([sizes.prompt / one for one in taken_s], "tokens/s")
    # The head multiplies one row, and is not counted.
    head = sizes.config["vocab_size"] * sizes.config["hidden_size"]
    flops = 2 * (model.read_bytes / model_loads.DTYPE.itemsize - head) * sizes.prompt
    metrics["prefill_share"] = share(flops, taken_s, ceilings.flops_per_s)
    return metrics


def their_metrics(sizes: model_loads.ModelSizes, repeats: int) -> dict[str, Metric]:
    """The same steps of transformers."""
    model = model_loads.TransformersModel(sizes)
    metrics = {
        f"transformers_decode_tokens_per_s_b{batch}": spread(
            [batch / one for one in seconds(model.decode(batch), repeats)], "tokens/s"
        )
        for batch in sizes.batches
    }
    taken = seconds(model.prefill(), repeats)
    metrics["transformers_prefill_tokens_per_s"] = spread([sizes.prompt / one for one in taken], "tokens/s")
    return metrics


@torch.inference_mode()
def run(*, small: bool, repeats: int) -> Report:
    """Measures everything."""
    sizes, model = (kernel_loads.SMALL, model_loads.SMALL) if small else (kernel_loads.Sizes(), model_loads.LLAMA_8B)
    ceilings = measure_ceilings(1 << 12 if small else 4 << 30, 32 if small else 8192, repeats)
    metrics = {
        "copy_bandwidth": spread([one / 1e9 for one in ceilings.bytes_per_s], "GB/s"),
        "matmul_rate": spread([one / 1e12 for one in ceilings.flops_per_s], "TFLOP/s"),
    }
    left_out: dict[str, str] = {}
    parts = {
        "kernels": lambda: kernel_metrics(sizes, ceilings, repeats),
        "model": lambda: our_metrics(model, ceilings, repeats),
        "transformers": lambda: their_metrics(model, repeats),
    }
    for name, measure in parts.items():
        try:
            metrics |= measure()
        except torch.OutOfMemoryError as error:
            left_out[name] = str(error).splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
    for key in [key for key in metrics if key.startswith("transformers_")]:
        name = key.removeprefix("transformers_")
        if name in metrics:
            gain = metrics[name].value / metrics[key].value
            metrics[f"{name.replace('_tokens_per_s', '')}_over_transformers"] = Metric(value=gain, unit="x")
    return Report(
        name="gpu",
        headline=_headline(metrics),
        metrics=metrics,
        tables=[Rows(title="on the GPU", columns=["", "median (middle half)"], rows=_rows(metrics))],
        versions={name: metadata.version(name) for name in ("triton", "transformers")} | _device(),
        left_out=left_out,
        settings={"small": small, "repeats": repeats},
    )


def _rows(metrics: dict[str, Metric]) -> list[list[str]]:
    return [[key, shown(metric, 1 if metric.value >= 10 else 2)] for key, metric in metrics.items()]


def _headline(metrics: dict[str, Metric]) -> str:
    def least(*prefixes: str) -> float:
        chosen = [m.value for key, m in metrics.items() if key.startswith(prefixes) and key.endswith("_share")]
        return min(chosen, default=0.0)

    gains = [metric.value for key, metric in metrics.items() if key.endswith("_over_transformers")]
    return (
        f"of copy bandwidth: decode attention {least('decode_attention'):.0f}%, "
        f"norms {least('rms_norm', 'add_rms_norm'):.0f}%, both at least; "
        f"over transformers: median {statistics.median(gains or [0.0]):.2f}x"
    )


def _device() -> dict[str, str]:
    if not HAS_GPU:
        return {"gpu": "none: interpreted"}
    return {"gpu": torch.cuda.get_device_name(DEVICE), "cuda": str(torch.version.cuda)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the results. Exit code 2 where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes: only to see that it runs")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{datetime.now(UTC).date().isoformat()}.json")
    options = parser.parse_args(argv)
    if not HAS_GPU and not options.small:
        print("torch sees no CUDA device here", file=sys.stderr)
        return 2
    load_at_start = os.getloadavg()
    publish(run(small=options.small, repeats=options.repeats), load_at_start=load_at_start, output=options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
