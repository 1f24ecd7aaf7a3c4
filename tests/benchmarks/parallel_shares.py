"""Tensor parallelism over two unequal hosts: what shares as their speeds gain over even ones, and what is ideal.

The hosts of an emulated cluster share one machine's memory and caches, so that both are slower while both compute. What
they reach alone is measured while they do, each with the whole model, as they do where they share one.
"""

import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.benchmarks.parallel_arms import Sizes, take_turns
from tests.benchmarks.parallel_figures import Findings, Samples, cell, fastest, merged, ratio, share_splits
from tests.benchmarks.parallel_hosts import Cluster, Plan, Replica, alone
from tests.benchmarks.parallel_steps import Workload
from tests.benchmarks.report import Metric, Rows, median

DELAY_S = 5e-5
_EVEN, _AS_SPEEDS = "even", "as speeds"
_IDEAL = "ideal sum"


def measure_shares(cluster: Cluster, model: Path, sizes: Sizes) -> Findings:
    """``weighted_gain``: decode throughput with the best weighted shares over that with even ones; and
    ``weighted_of_ideal``: over the sum of what both hosts reach alone at once. Of the batch with the most throughput;
    those of each have its size in their names.

    Args:
        cluster: whose second host has ``sizes.slow_share`` of a core.
    """
    cluster.set_delay(DELAY_S)
    works = [sizes.decode(batch) for batch in sizes.share_batches]
    slots = sizes.slots(*works)
    with ExitStack() as stack:
        hosts = [stack.enter_context(cluster.replica(model, alone(host), num_slots=slots)) for host in range(2)]
        # Not the best of them: a slow host is fast for a moment, until the share of its period is used up.
        rounds = [speeds_at_once(hosts, works[0]) for _ in range(sizes.repeats + 1)]
        splits = share_splits((median_of(rounds, 0), median_of(rounds, 1)))
        plans = {
            name: stack.enter_context(cluster.replica(model, Plan(name=name, stages=(shares,)), num_slots=slots))
            for name, shares in splits.items()
        }
        taken = {work.num_sequences: _take(hosts, plans, work, sizes.repeats) for work in works}
    found = merged([_findings(batch, taken[batch], splits, sizes) for batch in taken])
    most = max(taken, key=lambda batch: batch / statistics.median(taken[batch][_best(taken[batch])]))
    keys = {name: found.metrics[f"{name}_b{most}"] for name in ("weighted_gain", "weighted_of_ideal")}
    return merged([found, Findings(metrics=keys, settings={"weighted_batch": most})])


def speeds_at_once(hosts: Sequence[Replica], work: Workload) -> tuple[float, float]:
    """Steps a second of two replicas that compute at once: the second once, the first again and again meanwhile."""
    with ThreadPoolExecutor(1) as beside:
        slower = beside.submit(hosts[1].seconds, work, lanes="one")
        taken = [hosts[0].seconds(work, lanes="one")]
        while not slower.done():
            taken.append(hosts[0].seconds(work, lanes="one"))
    whole = taken[:-1] or taken  # during the last one the other may have ended
    return 1 / statistics.median(whole), 1 / slower.result()


def median_of(rounds: Sequence[tuple[float, float]], host: int) -> float:
    """Of one host's speeds, without those of the first round."""
    return statistics.median([speeds[host] for speeds in rounds[1:]])


def _take(
    hosts: Sequence[Replica], plans: Mapping[str, Replica], work: Workload, repeats: int
) -> dict[str, list[float]]:
    """Seconds of a step by plan, and of the ideal."""
    arms = {name: partial(replica.seconds, work) for name, replica in plans.items()}
    return take_turns({_IDEAL: lambda: 1 / sum(speeds_at_once(hosts, work)), **arms}, repeats)


def _best(taken: Mapping[str, Samples]) -> str:
    return fastest({name: seconds for name, seconds in taken.items() if name not in (_EVEN, _IDEAL)})


def _findings(
    batch: int, taken: Mapping[str, list[float]], splits: Mapping[str, tuple[float, float]], sizes: Sizes
) -> Findings:
    best = _best(taken)
    metrics: dict[str, Metric] = {
        "weighted_gain": ratio(taken[_EVEN], taken[best]),
        "weighted_of_ideal": ratio(taken[_IDEAL], taken[best]),
        "weighted_gain_as_speeds": ratio(taken[_EVEN], taken[_AS_SPEEDS]),
        "even_of_ideal": ratio(taken[_IDEAL], taken[_EVEN]),
    }
    rows = [
        (name, _shown(splits.get(name)), cell(seconds), f"{batch / median(seconds, '').value:.2f}")
        for name, seconds in taken.items()
    ]
    columns = ("shares", "of host 0 : host 1", "ms a step", "tokens/s")
    title = f"hosts of 1 and {sizes.slow_share:g} cores, batch {batch}"
    return Findings(
        metrics={f"{name}_b{batch}": metric for name, metric in metrics.items()},
        tables=[Rows(title=title, columns=columns, rows=rows)],
        settings={f"weighted_best_b{batch}": best, "weighted_shares": splits},
    )


def _shown(shares: tuple[float, float] | None) -> str:
    return "" if shares is None else f"{shares[0]:.2f} : {shares[1]:.2f}"
