"""``make bench-attention``: decode attention over shuffled KV blocks, against gathering them and against no need to.

Three arms in one process, interleaved call by call: ``paged`` reads blocks where they lie, ``gather`` copies the
context into one piece and runs torch's flash attention, ``view`` runs that on a context which already is one piece
(what paging gives up). Ratios are medians of pairs; above 1 means that paged is faster.
"""

import argparse
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import torch

from kernels import cpu
from kernels.attention import LayerCache, SequenceSpan
from tests.benchmarks.report import RESULTS, Metric, Report, Rows, publish, shown

SHAPES = ((4, 2, 32), (4, 8, 64), (8, 4, 128))  # K KV heads, G query heads each, D: demo, 1.1 B and 8 B Llama
LOADS = ((1, 1024), (1, 4096), (16, 256), (16, 1024))  # sequences, tokens of each
BLOCK = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def arms(shape: tuple[int, int, int], load: tuple[int, int], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One call of each arm, over the same amount of KV."""
    (num_kv_heads, group, head_dim), (num_sequences, length) = shape, load
    num_slots = num_sequences * length
    keys, values = (torch.randn(num_kv_heads, num_slots, head_dim).to(dtype) for _ in range(2))
    cache = LayerCache(keys=keys, values=values)
    query = torch.randn(num_sequences, num_kv_heads * group, head_dim).to(dtype)
    fresh = torch.randn(num_sequences, num_kv_heads, head_dim).to(dtype)
    blocks = random.Random(1).sample(range(num_slots // BLOCK), num_slots // BLOCK)
    per = length // BLOCK
    tables = [blocks[i * per : (i + 1) * per] for i in range(num_sequences)]
    runs = [tuple((b * BLOCK, (b + 1) * BLOCK) for b in table) for table in tables]
    plan = cpu.plan([SequenceSpan(query_start=i, num_queries=1, runs=run) for i, run in enumerate(runs)])
    slots = [torch.cat([torch.arange(*run) for run in sequence]) for sequence in runs]
    rows = query.view(num_sequences, 1, num_kv_heads, group, head_dim)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    scale = head_dim**-0.5

    def gather() -> None:
        for row, at in zip(rows, slots, strict=True):
            flash(row, keys.index_select(1, at)[None], values.index_select(1, at)[None], scale=scale)

    def view() -> None:
        for i, row in enumerate(rows):
            piece = slice(i * length, (i + 1) * length)
            flash(row, keys[None, :, piece], values[None, :, piece], scale=scale)

    return {
        "paged": lambda: cpu.attention(query, fresh, fresh, cache, plan, scale),
        "gather": gather,
        "view": view,
    }


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call of each arm, the arms in turn; the first two rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if round_number >= 2:
                taken[name].append(time.perf_counter() - started)
    return taken


def ratio(other: list[float], ours: list[float]) -> Metric:
    """The median of the pairs' ratios; the spread is that of the middle half."""
    pairs = sorted(b / a for a, b in zip(ours, other, strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Metric(value=middle, unit="x", samples=len(pairs), spread=(low, high))


def compare(shape: tuple[int, int, int], load: tuple[int, int], name: str, repeats: int) -> dict[str, Metric]:
    """The metrics of one shape, load and dtype."""
    taken = measure(arms(shape, load, DTYPES[name]), repeats)
    key = key_of(shape, load, name)
    paged_us = statistics.median(taken["paged"]) * 1e6
    ours = {f"{key}_us": Metric(value=paged_us, unit="us", samples=len(taken["paged"]))}
    return ours | {f"{arm}_over_paged_{key}": ratio(taken[arm], taken["paged"]) for arm in ("gather", "view")}


def key_of(shape: tuple[int, int, int], load: tuple[int, int], name: str) -> str:
    """How the metrics of one shape, load and dtype are named."""
    return f"{'_'.join(map(str, shape))}_{name}_{load[0]}x{load[1]}"


def row(shape: tuple[int, int, int], load: tuple[int, int], name: str, metrics: dict[str, Metric]) -> list[str]:
    """The same for the table."""
    key = key_of(shape, load, name)
    ratios = [shown(metrics[f"{arm}_over_paged_{key}"]) for arm in ("gather", "view")]
    return [",".join(map(str, shape)), name, f"{load[0]}x{load[1]}", f"{metrics[f'{key}_us'].value:.0f}", *ratios]


def main() -> int:
    """Measure, print a table, write build/bench/attention.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_at_start = os.getloadavg()
    metrics: dict[str, Metric] = {}
    rows = []
    for shape, name, load in itertools.product(SHAPES, DTYPES, LOADS):
        metrics |= compare(shape, load, name, options.repeats)
        rows.append(row(shape, load, name, metrics))
        print(*rows[-1], flush=True)
    gains = [metric.value for key, metric in metrics.items() if key.startswith("gather_over")]
    metrics["gather_over_paged_least"] = Metric(value=min(gains), unit="x", samples=len(gains))
    columns = ["K,G,D", "dtype", "sequences", "paged us", "gather/paged", "view/paged"]
    report = Report(
        name="attention",
        headline=f"paged over gathering: median {statistics.median(gains):.2f}x, least {min(gains):.2f}x",
        metrics=metrics,
        tables=[Rows(title="decode attention: medians (middle half)", columns=columns, rows=rows)],
        versions={"numba": numba.__version__},
        settings={"threads": options.threads, "repeats": options.repeats},
    )
    publish(report, load_at_start=load_at_start, output=options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
