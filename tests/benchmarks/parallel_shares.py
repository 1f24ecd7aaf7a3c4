"""Tensor parallelism over two unequal hosts: what shares as their speeds gain over even ones, and what is ideal."""

import statistics
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.benchmarks.parallel_arms import Arms, Sizes, take_turns
from tests.benchmarks.parallel_figures import Findings, Samples, cell, fastest, ratio, share_splits
from tests.benchmarks.parallel_hosts import Cluster, Plan, Replica, alone
from tests.benchmarks.parallel_steps import Workload
from tests.benchmarks.report import Metric, Rows, median

DELAY_S = 5e-5
_EVEN, _AS_SPEEDS = "even", "as speeds"
_HOSTS = ("host 0 alone", "host 1 alone")


def measure_shares(cluster: Cluster, model: Path, sizes: Sizes) -> Findings:
    """``weighted_gain``: decode throughput with the best weighted shares over that with even ones; and
    ``weighted_of_ideal``: over the sum of what both hosts reach alone, each with the whole model.

    Args:
        cluster: whose second host has ``sizes.slow_share`` of a core.
    """
    cluster.set_delay(DELAY_S)
    work = sizes.decode(sizes.batch)
    slots = sizes.slots(work)
    with ExitStack() as stack:
        arms: dict[str, Replica] = {
            name: stack.enter_context(cluster.replica(model, alone(host), num_slots=slots))
            for host, name in enumerate(_HOSTS)
        }
        first = take_turns(_arms(arms, work), sizes.repeats)
        # Not the best of them: a slow host is fast for a moment, until the share of its period is used up.
        speeds = (1 / statistics.median(first[_HOSTS[0]]), 1 / statistics.median(first[_HOSTS[1]]))
        splits = share_splits(speeds)
        for name, shares in splits.items():
            plan = Plan(name=name, stages=(shares,))
            arms[name] = stack.enter_context(cluster.replica(model, plan, num_slots=slots))
        taken = take_turns(_arms(arms, work), sizes.repeats)
    best = fastest({name: taken[name] for name in splits if name != _EVEN})
    rows = [
        (name, _shown(splits.get(name)), cell(seconds), f"{sizes.batch / median(seconds, '').value:.2f}")
        for name, seconds in taken.items()
    ]
    columns = ("shares", "of host 0 : host 1", "ms a step", "tokens/s")
    title = f"hosts of 1 and {sizes.slow_share:g} cores, batch {sizes.batch}"
    return Findings(
        metrics=_metrics(taken, best),
        tables=[Rows(title=title, columns=columns, rows=rows)],
        settings={
            "weighted_best": best,
            "weighted_shares": splits,
            "weighted_speeds": [sizes.batch * s for s in speeds],
        },
    )


def _arms(replicas: dict[str, Replica], work: Workload) -> Arms:
    return {name: partial(replica.seconds, work, lanes="one") for name, replica in replicas.items()}


def _metrics(taken: dict[str, list[float]], best: str) -> dict[str, Metric]:
    return {
        "weighted_gain": ratio(taken[_EVEN], taken[best]),
        "weighted_of_ideal": of_ideal(taken[best], taken[_HOSTS[0]], taken[_HOSTS[1]]),
        "weighted_gain_as_speeds": ratio(taken[_EVEN], taken[_AS_SPEEDS]),
        "even_of_ideal": of_ideal(taken[_EVEN], taken[_HOSTS[0]], taken[_HOSTS[1]]),
    }


def of_ideal(together: Samples, one: Samples, other: Samples) -> Metric:
    """Throughput over the sum of two others, of seconds for the same work."""
    rounds = zip(together, one, other, strict=True)
    return median([(1 / all_s) / (1 / one_s + 1 / other_s) for all_s, one_s, other_s in rounds], "x")


def _shown(shares: tuple[float, float] | None) -> str:
    return "" if shares is None else f"{shares[0]:.2f} : {shares[1]:.2f}"
