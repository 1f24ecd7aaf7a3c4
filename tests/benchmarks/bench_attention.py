"""``make bench-attention``: decode attention over shuffled KV blocks, against gathering them and against no need to.

Three arms in one process, interleaved call by call: ``paged`` reads blocks where they lie, ``gather`` copies the
context into one piece and runs torch's flash attention, ``view`` runs that on a context which already is one piece
(what paging gives up). Ratios are medians of pairs; above 1 means that paged is faster.
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch

from kernels import cpu
from kernels.attention import LayerCache, SequenceSpan

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


def ratio(other: list[float], ours: list[float]) -> dict[str, Any]:
    """The median of the pairs' ratios, with its quartiles as spread."""
    pairs = sorted(b / a for a, b in zip(ours, other, strict=True))
    low, middle, high = statistics.quantiles(pairs, n=4)
    return {"value": middle, "unit": "x", "samples": len(pairs), "quartiles": [low, high]}


def compare(shape: tuple[int, int, int], load: tuple[int, int], name: str, repeats: int) -> dict[str, Any]:
    """The metrics of one shape, load and dtype; prints their row."""
    taken = measure(arms(shape, load, DTYPES[name]), repeats)
    key = f"{'_'.join(map(str, shape))}_{name}_{load[0]}x{load[1]}"
    paged_us = statistics.median(taken["paged"]) * 1e6
    found = {arm: ratio(taken[arm], taken["paged"]) for arm in ("gather", "view")}
    cells = [f"{one['value']:6.2f} ({one['quartiles'][0]:.2f}-{one['quartiles'][1]:.2f})" for one in found.values()]
    where = f"{load[0]}x{load[1]}"
    heads = ",".join(map(str, shape))
    print(f"{heads:>9} {name:>9} {where:>12} {paged_us:9.0f} {cells[0]:>22} {cells[1]:>22}", flush=True)
    ours = {f"{key}_us": {"value": paged_us, "unit": "us", "samples": len(taken["paged"])}}
    return ours | {f"{arm}_over_paged_{key}": one for arm, one in found.items()}


def report(metrics: dict[str, Any], threads: int, output: Path) -> None:
    """Write the metrics with what they were measured on."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": "attention",
        "machine": {"processor": platform.processor() or platform.machine(), "threads": threads},
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numba": numba.__version__},
        "metrics": metrics,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


def main() -> int:
    """Measure, print a table, write build/bench/attention.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("build/bench/attention.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'K,G,D':>9} {'dtype':>9} {'sequences':>12} {'paged us':>9} {'gather/paged':>22} {'view/paged':>22}")
    metrics: dict[str, Any] = {}
    for shape, name, load in itertools.product(SHAPES, DTYPES, LOADS):
        metrics |= compare(shape, load, name, options.repeats)
    gains = [metric["value"] for key, metric in metrics.items() if key.startswith("gather_over")]
    metrics["gather_over_paged_least"] = {"value": min(gains), "unit": "x", "samples": len(gains)}
    report(metrics, options.threads, options.output)
    print(f"paged over gathering: median {statistics.median(gains):.2f}x, least {min(gains):.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
