"""Tensor parallelism over two equal hosts: what our sums gain over gloo's, and how much of them two lanes hide."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.benchmarks.parallel.hosts.parallel_hosts import TENSOR, Cluster, Replica
from tests.benchmarks.parallel.hosts.parallel_wire import Lanes
from tests.benchmarks.parallel.parallel_arms import Sizes, prefill, take_turns
from tests.benchmarks.parallel.parallel_figures import (
    Findings,
    cell,
    delay_name,
    hidden_share,
    merged,
    milliseconds,
    over_delay,
    ratio,
    worst,
)
from tests.benchmarks.parallel.parallel_steps import Workload
from tests.benchmarks.parallel.parallel_sums import Sums
from tests.benchmarks.report import Metric, Rows

# Prefills of up to so many tokens are short enough to be measured more often.
_SHORT, _SHORT_REPEATS = 256, 4


def measure_pairwise(cluster: Cluster, model: Path, sizes: Sizes) -> Findings:
    """``pairwise_gain_{delay}``: time of a decode with gloo's sums over that with those our ranks measured to be best.

    The metrics have both times, too.
    """
    work = sizes.decode(1)
    samples: dict[tuple[str, float], list[float]] = {}
    metrics: dict[str, Metric] = {}
    tables: dict[str, str] = {}
    for delay_s in sizes.delays_s:
        cluster.set_delay(delay_s)
        with cluster.replica(model, TENSOR, num_slots=sizes.slots(work)) as replica:
            cluster.join_gloo()
            taken = take_turns(
                {sums.value: _with_sums(replica, sums, work) for sums in (Sums.OURS, Sums.GLOO)}, sizes.repeats
            )
            tables[delay_name(delay_s)] = replica.measured["sums"]
        samples |= {(arm, delay_s): seconds for arm, seconds in taken.items()}
        ours, gloo = taken["ours"], taken["gloo"]
        metrics[f"pairwise_gain_{delay_name(delay_s)}"] = ratio(gloo, ours)
        metrics |= {f"decode_{arm}_{delay_name(delay_s)}": milliseconds(seconds) for arm, seconds in taken.items()}
    rows = [
        (delay_name(d), *(cell(samples[arm, d]) for arm in ("ours", "gloo")), tables[delay_name(d)])
        for d in sizes.delays_s
    ]
    columns = ("one way", "our sums", "gloo", "our table")
    return Findings(
        metrics=metrics,
        tables=[Rows(title="tensor parallel 2, batch 1: ms a token", columns=columns, rows=rows)],
        curves=[over_delay("decode at batch 1, tensor parallel 2", samples)],
        settings={"sums_tables": tables},
    )


def _with_sums(replica: Replica, sums: Sums, work: Workload, lanes: Lanes = "one") -> Callable[[], float]:
    """An arm: the workload with these sums, which are ours again afterwards."""

    def run() -> float:
        if sums is Sums.OURS:
            return replica.seconds(work, lanes=lanes)
        replica.set_sums(sums)
        seconds = replica.seconds(work, lanes=lanes)
        replica.set_sums(Sums.OURS)
        return seconds

    return run


def measure_overlap(cluster: Cluster, model: Path, sizes: Sizes) -> Findings:
    """``overlap_hidden_{delay}``: the share of the sums' time in a long prefill that two lanes hide; and
    ``overlap_worst_slowdown``: the most that what the ranks chose took, beside one lane, over prefills of all lengths.

    The table they choose by is what they measured when they were opened.
    """
    longest = max(*sizes.lengths, sizes.prefill)
    samples: dict[tuple[str, float], list[float]] = {}
    found: list[Findings] = []
    for delay_s in sizes.delays_s:
        cluster.set_delay(delay_s)
        slots = sizes.slots(prefill(longest))
        with cluster.replica(model, TENSOR, num_slots=slots, token_budget=longest) as replica:
            work = prefill(sizes.prefill)
            arms = {
                "one lane": _with_sums(replica, Sums.OURS, work),
                "two lanes": _with_sums(replica, Sums.OURS, work, "two"),
                "no sums": _with_sums(replica, Sums.SILENT, work),
            }
            taken = take_turns(arms, sizes.repeats)
            samples |= {(arm, delay_s): seconds for arm, seconds in taken.items()}
            found.append(_hidden(delay_s, taken))
            if delay_s == sizes.key_delay_s:
                found.append(_slowdowns(replica, sizes))
    rows = [
        (delay_name(d), *(cell(samples[arm, d]) for arm in ("one lane", "two lanes", "no sums")))
        for d in sizes.delays_s
    ]
    title = f"tensor parallel 2, prefill of {sizes.prefill}: ms"
    tables = [Rows(title=title, columns=("one way", "one lane", "two lanes", "no sums"), rows=rows)]
    curves = [over_delay(f"prefill of {sizes.prefill}, tensor parallel 2", samples)]
    return merged([*found, Findings(tables=tables, curves=curves)])


def _hidden(delay_s: float, taken: Mapping[str, Sequence[float]]) -> Findings:
    key = f"overlap_hidden_{delay_name(delay_s)}"
    share = hidden_share(taken["one lane"], taken["two lanes"], taken["no sums"])
    if share is None:
        return Findings(left_out={key: "sums took no time that could be seen"})
    return Findings(metrics={key: share})


def _slowdowns(replica: Replica, sizes: Sizes) -> Findings:
    """What the ranks choose, beside one lane, at every length."""
    ratios: dict[int, Metric] = {}
    is_woven: dict[int, bool] = {}
    rows = []
    for length in sizes.lengths:
        work = prefill(length)
        is_woven[length] = bool(replica.choice(work)["is_woven"])
        lanes: tuple[Lanes, Lanes] = ("measured", "one")
        repeats = sizes.repeats * (_SHORT_REPEATS if length <= _SHORT else 1)
        taken = take_turns({one: _with_sums(replica, Sums.OURS, work, one) for one in lanes}, repeats)
        ratios[length] = ratio(taken["measured"], taken["one"])
        chosen = "two lanes" if is_woven[length] else "one lane"
        spread = ratios[length].spread or (ratios[length].value,) * 2
        shown = f"{ratios[length].value:.3f} ({spread[0]:.3f}-{spread[1]:.3f})"
        rows.append((str(length), chosen, cell(taken["measured"]), cell(taken["one"]), shown))
    length, slowdown = worst(ratios)
    metrics = {"overlap_worst_slowdown": slowdown}
    same = {length: metric for length, metric in ratios.items() if not is_woven[length]}
    if same:  # the same step twice: how much of the worst is noise
        metrics["overlap_same_step_ratio"] = worst(same)[1]
    if len(same) < len(ratios):
        metrics["overlap_woven_slowdown"] = worst({k: m for k, m in ratios.items() if k not in same})[1]
    columns = ("tokens", "chosen", "as chosen, ms", "one lane, ms", "ratio")
    return Findings(
        metrics=metrics,
        tables=[Rows(title=f"lanes at {delay_name(sizes.key_delay_s)}", columns=columns, rows=rows)],
        settings={"overlap_table": replica.measured["overlap"], "overlap_worst_length": length},
    )
