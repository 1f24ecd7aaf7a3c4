"""Ranks that share sequences: whether the exchange that they choose is the fastest there is."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from placement.measured.exchange import Exchange
from tests.benchmarks.parallel.hosts.parallel_hosts import SEQUENCE, Cluster, Replica
from tests.benchmarks.parallel.parallel_arms import Arms, Sizes, prefill, take_turns
from tests.benchmarks.parallel.parallel_figures import Findings, cell, delay_name, fastest, loss, over_delay
from tests.benchmarks.parallel.parallel_steps import Workload
from tests.benchmarks.report import Curve, Metric, Rows

# So that no way is ruled out by the memory that it takes.
_TOKEN_BUDGET = 4096

Taken = Mapping[str, Sequence[float]]
Case = tuple[str, tuple[int, int], float]
"""A model, the tokens of a chunk and those before it, and a delay in seconds."""


def measure_exchanges(cluster: Cluster, models: Mapping[str, Path], sizes: Sizes) -> Findings:
    """``chooser_worst_loss``: how much longer than the fastest the chosen exchange took, as a share, at the worst.

    Args:
        models: by what they are called in tables.
    """
    taken: dict[Case, Taken] = {}
    picked: dict[Case, str] = {}
    speeds: dict[str, str] = {}
    for name, model in models.items():
        for delay_s in sizes.delays_s:
            cluster.set_delay(delay_s)
            works = {chunk: prefill(chunk[0], start=chunk[1]) for chunk in sizes.chunks}
            slots = sizes.slots(*works.values())
            with cluster.replica(model, SEQUENCE, num_slots=slots, token_budget=_TOKEN_BUDGET) as replica:
                speeds[f"{name} {delay_name(delay_s)}"] = replica.measured["sharing"]
                for chunk, work in works.items():
                    case = name, chunk, delay_s
                    picked[case] = str(replica.choice(work)["exchange"])
                    taken[case] = take_turns(_arms(replica, work), sizes.repeats)
    losses = {case: loss(samples, picked[case]) for case, samples in taken.items()}
    worst = max(losses, key=lambda case: losses[case].value)
    return Findings(
        metrics={"chooser_worst_loss": losses[worst]},
        tables=[_table(taken, picked, losses)],
        curves=_curves(taken, sizes),
        settings={"chooser_worst_case": [worst[0], list(worst[1]), delay_name(worst[2])], "chooser_speeds": speeds},
    )


def _arms(replica: Replica, work: Workload) -> Arms:
    return {way.value: partial(replica.seconds, work, exchange=way.value) for way in Exchange}


def _table(taken: Mapping[Case, Taken], picked: Mapping[Case, str], losses: Mapping[Case, Metric]) -> Rows:
    ways = [way.value for way in Exchange]
    rows = [
        (
            f"{name}, {chunk[0]} after {chunk[1]}",
            delay_name(delay_s),
            *(cell(samples[way]) for way in ways),
            picked[name, chunk, delay_s],
            fastest(samples),
            f"{100 * losses[name, chunk, delay_s].value:.1f}%",
        )
        for (name, chunk, delay_s), samples in taken.items()
    ]
    columns = ("model, tokens", "one way", *(f"{way}, ms" for way in ways), "picked", "fastest", "loss")
    return Rows(title="exchanges of ranks that share sequences", columns=columns, rows=rows)


def _curves(taken: Mapping[Case, Taken], sizes: Sizes) -> list[Curve]:
    """One for each chunk."""
    return [
        over_delay(
            f"sequence parallel 2: {chunk[0]} tokens after {chunk[1]}",
            {
                (f"{name} {way}", delay_s): seconds
                for (name, its_chunk, delay_s), samples in taken.items()
                if its_chunk == chunk
                for way, seconds in samples.items()
            },
        )
        for chunk in sizes.chunks
    ]
