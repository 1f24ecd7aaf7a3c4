"""Tensor parallelism over two unequal hosts: what shares as their speeds gain over even ones, and what is ideal.

The hosts of an emulated cluster share one machine's memory and caches, so that both are slower while both compute. What
they reach alone is measured while they do, each with the whole model, as they do where they share one.
"""

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.benchmarks.parallel.hosts.parallel_hosts import Cluster, Plan, Replica, alone
from tests.benchmarks.parallel.parallel_arms import Sizes, take_turns
from tests.benchmarks.parallel.parallel_figures import Findings, cell, fastest, merged, ratio, share_splits
from tests.benchmarks.parallel.parallel_steps import Workload
from tests.benchmarks.report import Rows, median

DELAY_S = 5e-5
_EVEN, _BEST, _IDEAL = "even", "best", "ideal sum"


def measure_shares(cluster: Cluster, model: Path, sizes: Sizes) -> Findings:
    """``weighted_gain``: decode throughput with the best weighted shares over that with even ones; and
    ``weighted_of_ideal``: over the sum of what both hosts reach alone at once. Of the batch with the most throughput;
    those of each have its size in their names.

    Args:
        cluster: whose second host has ``sizes.slow_share`` of a core.
    """
    cluster.set_delay(DELAY_S)
    works = [_work(batch, sizes) for batch in sizes.share_batches]
    slots = sizes.slots(*works)
    found: dict[int, Findings] = {}
    with ExitStack() as stack:
        hosts = [stack.enter_context(cluster.replica(model, alone(host), num_slots=slots)) for host in range(2)]
        for work in works:
            found[work.num_sequences] = _measure(cluster, model, hosts, work, sizes)
    together = merged(list(found.values()))
    most = max(found, key=lambda batch: together.metrics[f"weighted_tokens_per_s_b{batch}"].value)
    keys = {name: together.metrics[f"{name}_b{most}"] for name in ("weighted_gain", "weighted_of_ideal")}
    return merged([together, Findings(metrics=keys, settings={"weighted_batch": most})])


def _work(batch: int, sizes: Sizes) -> Workload:
    """Decodes of so many sequences: the longer a step takes, the fewer of them, down to a quarter."""
    return replace(sizes.decode(batch), num_steps=max(sizes.steps // 4, min(sizes.steps, 8 * sizes.steps // batch)))


def _measure(cluster: Cluster, model: Path, hosts: Sequence[Replica], work: Workload, sizes: Sizes) -> Findings:
    """Of one batch. The best shares are chosen by some samples, and measured by others."""
    batch = work.num_sequences
    # Not the best of them: a slow host is fast for a moment, until the share of its period is used up.
    rounds = [speeds_at_once(hosts, work) for _ in range(sizes.repeats + 1)]
    speeds = median_of(rounds, 0), median_of(rounds, 1)
    splits = share_splits(speeds)
    with ExitStack() as stack:
        arms: dict[str, Callable[[], float]] = {}
        for name, shares in splits.items():
            plan = Plan(name=name, stages=(shares,))
            replica = stack.enter_context(cluster.replica(model, plan, num_slots=sizes.slots(work)))
            arms[name] = partial(replica.seconds, work)
        tried = take_turns(arms, sizes.repeats)
        best = fastest({name: seconds for name, seconds in tried.items() if name != _EVEN})
        ideal = {_IDEAL: lambda: 1 / sum(speeds_at_once(hosts, work))}
        taken = take_turns({**ideal, _EVEN: arms[_EVEN], _BEST: arms[best]}, sizes.repeats)
    metrics = {
        "weighted_gain": ratio(taken[_EVEN], taken[_BEST]),
        "weighted_of_ideal": ratio(taken[_IDEAL], taken[_BEST]),
        "even_of_ideal": ratio(taken[_IDEAL], taken[_EVEN]),
        "weighted_tokens_per_s": median([batch / seconds for seconds in taken[_BEST]], "tokens/s"),
    }
    shown = {**{f"{name}, tried": seconds for name, seconds in tried.items()}, **taken}
    rows = [(name, cell(seconds), f"{batch / median(seconds, '').value:.2f}") for name, seconds in shown.items()]
    title = f"hosts of 1 and {sizes.slow_share:g} cores, batch {batch}; best: {best}, {_shown(splits[best])}"
    return Findings(
        metrics={f"{name}_b{batch}": metric for name, metric in metrics.items()},
        tables=[Rows(title=title, columns=("shares", "ms a step", "tokens/s"), rows=rows)],
        settings={
            f"weighted_best_b{batch}": best,
            f"weighted_shares_b{batch}": splits,
            f"weighted_speeds_b{batch}": [batch * speed for speed in speeds],
        },
    )


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


def _shown(shares: tuple[float, float]) -> str:
    return f"{shares[0]:.2f} : {shares[1]:.2f}"
