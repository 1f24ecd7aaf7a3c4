"""``make bench-attention``: attention over shuffled KV blocks, against gathering them and against no need to.

Arms in one process, interleaved call by call. Decodes: ``paged`` reads blocks where they lie, ``gather`` copies the
context into one piece and runs torch's flash attention, ``view`` runs that on a context which already is one piece
(what paging gives up). Prefills: ``paged`` against ``flash``, torch's on one piece. Decodes behind one prefix:
``paged`` attends to it once for all, ``own`` once a sequence. Ratios are medians of pairs; above 1 means that paged is
faster.
"""

import argparse
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numba
import torch

from kernels.attention import LayerCache, Run, SequenceSpan, SharedSpan
from kernels.cpu import variant as cpu
from tests.benchmarks.report import RESULTS, Metric, Report, Rows, publish, shown

SHAPES = ((4, 2, 32), (4, 8, 64), (8, 4, 128))  # K KV heads, G query heads each, D: demo, 1.1 B and 8 B Llama
LOADS = ((1, 1024), (1, 4096), (16, 256), (16, 1024))  # sequences, tokens of each
PREFILLS = (256, 2048)  # tokens of one prompt
PREFIXES = ((8, 1024), (64, 4096))  # sequences, tokens that they share
OWN = 64  # tokens of each sequence behind the prefix
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


def shuffled(num_blocks: int) -> list[Run]:
    """Blocks in random order."""
    return [(block * BLOCK, (block + 1) * BLOCK) for block in random.Random(1).sample(range(num_blocks), num_blocks)]


def prefill_arms(shape: tuple[int, int, int], length: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One prompt, computed at once."""
    num_kv_heads, group, head_dim = shape
    keys, values = (torch.randn(num_kv_heads, length, head_dim).to(dtype) for _ in range(2))
    cache = LayerCache(keys=keys, values=values)
    query = torch.randn(length, num_kv_heads * group, head_dim).to(dtype)
    fresh = torch.randn(length, num_kv_heads, head_dim).to(dtype)
    span = SequenceSpan(query_start=0, num_queries=length, runs=tuple(shuffled(length // BLOCK)))
    rows = query.view(length, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    dense = [stored[:, None].expand(rows.shape) for stored in (keys, values)]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    plan, scale = cpu.plan([span]), head_dim**-0.5
    return {
        "paged": lambda: cpu.attention(query, fresh, fresh, cache, plan, scale),
        "flash": lambda: flash(rows, *dense, 0.0, True, scale=scale),
    }


def shared_arms(
    shape: tuple[int, int, int], load: tuple[int, int], dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """A decode of each sequence behind one prefix."""
    (num_kv_heads, group, head_dim), (num_sequences, length) = shape, load
    num_slots = length + num_sequences * OWN
    keys, values = (torch.randn(num_kv_heads, num_slots, head_dim).to(dtype) for _ in range(2))
    cache = LayerCache(keys=keys, values=values)
    query = torch.randn(num_sequences, num_kv_heads * group, head_dim).to(dtype)
    fresh = torch.randn(num_sequences, num_kv_heads, head_dim).to(dtype)
    runs, (many, few) = shuffled(num_slots // BLOCK), (length // BLOCK, OWN // BLOCK)
    prefix, rest = tuple(runs[:many]), runs[many:]
    spans = [
        SequenceSpan(query_start=i, num_queries=1, runs=(*prefix, *rest[i * few : (i + 1) * few]))
        for i in range(num_sequences)
    ]
    shared = SharedSpan(members=tuple(range(num_sequences)), first_token=0, num_tokens=length, runs=prefix)
    plans, scale = (cpu.plan(spans, shared=[shared]), cpu.plan(spans)), head_dim**-0.5
    once, each = (partial(cpu.attention, query, fresh, fresh, cache, plan, scale) for plan in plans)
    return {"paged": once, "own": each}


def measure(calls: dict[str, Callable[[], object]], repeats: int, warm_up: int) -> dict[str, list[float]]:
    """Seconds of each call of each arm, the arms in turn; the first ``warm_up`` rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + warm_up):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if round_number >= warm_up:
                taken[name].append(time.perf_counter() - started)
    return taken


def ratio(other: list[float], ours: list[float]) -> Metric:
    """The median of the pairs' ratios; the spread is that of the middle half."""
    pairs = sorted(b / a for a, b in zip(ours, other, strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return Metric(value=middle, unit="x", samples=len(pairs), spread=(low, high))


def compare(key: str, calls: dict[str, Callable[[], object]], repeats: int, warm_up: int) -> dict[str, Metric]:
    """The metrics of the arms, of which one is ``paged``."""
    taken = measure(calls, repeats, warm_up)
    paged_us = statistics.median(taken["paged"]) * 1e6
    ours = {f"{key}_us": Metric(value=paged_us, unit="us", samples=len(taken["paged"]))}
    others = taken.keys() - {"paged"}
    return ours | {f"{arm}_over_paged_{key}": ratio(taken[arm], taken["paged"]) for arm in sorted(others)}


def compare_all(repeats: int, warm_up: int) -> tuple[dict[str, Metric], list[Rows]]:
    """All metrics, and a table for each kind of work."""
    kinds: tuple[tuple[str, Callable[..., dict[str, Callable[[], object]]], tuple[Any, ...]], ...] = (
        ("decode", arms, LOADS),
        ("prefill", prefill_arms, PREFILLS),
        ("shared", shared_arms, PREFIXES),
    )
    metrics: dict[str, Metric] = {}
    tables = []
    for kind, make, loads in kinds:
        rows, ratios = [], []
        for shape, name, load in itertools.product(SHAPES, DTYPES, loads):
            what = "x".join(map(str, load)) if isinstance(load, tuple) else str(load)
            key = f"{'_'.join(map(str, shape))}_{name}_{what}"
            calls = make(shape, load, DTYPES[name])
            found = compare(key if kind == "decode" else f"{kind}_{key}", calls, repeats, warm_up)
            metrics.update(found)
            ours, *others = found.values()
            ratios = [metric.split("_over_")[0] for metric in list(found)[1:]]
            rows.append([",".join(map(str, shape)), name, what, f"{ours.value:.0f}", *map(shown, others)])
            print(kind, *rows[-1], flush=True)
        columns = ["K,G,D", "dtype", "tokens", "paged us", *(f"{arm}/paged" for arm in ratios)]
        tables.append(Rows(title=f"{kind} attention: medians (middle half)", columns=columns, rows=rows))
    return metrics, tables


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--output", type=Path, default=RESULTS / "attention.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write build/bench/attention.json."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    load_at_start = os.getloadavg()
    metrics, tables = compare_all(options.repeats, options.warm_up)
    gains = [metric.value for key, metric in metrics.items() if key.startswith("gather_over")]
    metrics["gather_over_paged_least"] = Metric(value=min(gains), unit="x", samples=len(gains))
    report = Report(
        name="attention",
        headline=f"paged over gathering: median {statistics.median(gains):.2f}x, least {min(gains):.2f}x",
        metrics=metrics,
        tables=tables,
        versions={"numba": numba.__version__},
        settings={"threads": options.threads, "repeats": options.repeats},
    )
    publish(report, load_at_start=load_at_start, output=options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
