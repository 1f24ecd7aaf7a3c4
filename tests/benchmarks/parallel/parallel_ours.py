"""Our best plan over two equal hosts, for whoever compares it with other engines on the same ones.

    with cluster() as net:
        net.set_delay(1e-3)
        with our_plans(net, model, sizes) as ours:
            for repeat in range(repeats + 1):               # the first is to warm up
                taken = ours.sample(sizes.decode(1))        # seconds by plan, once each

:func:`measure_ours` does that for all workloads and delays. The plans, all open at once: tensor parallel 2 with even
shares, a pipeline of 2 stages, and sequence parallel 2. A pipeline's decodes are dealt out to as many batches as there
are stages, and its prefills measured whole and in pieces that follow each other through the stages.

What is timed are bare steps: a decode's seconds are those of one step of the batch, that is of one token for each of
its sequences, after the first; a prefill's are from the prompt's arrival at the leader until its first token. There is
no gateway, scheduler or tokenizer in them: other engines are to be timed likewise, or said to have those in theirs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.parallel.hosts.parallel_hosts import PIPELINE, SEQUENCE, TENSOR, Cluster, Replica
from tests.benchmarks.parallel.parallel_arms import Sizes, prefill
from tests.benchmarks.parallel.parallel_figures import Findings, cell, delay_name, fastest, milliseconds, over_delay
from tests.benchmarks.parallel.parallel_steps import Workload
from tests.benchmarks.report import Curve, Metric, Rows

PLANS = (TENSOR, PIPELINE, SEQUENCE)
_LEAST_PIECE = 64
_MOST_PIECES = 4
_NUM_STAGES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The plan with the least median for a workload at a delay.

    Attributes:
        plan: its name, with the number of pieces of a pipeline's prefill: ``pipeline/2``.
        seconds: one sample for each repeat; ``others``: of all plans, by name.
    """

    plan: str
    seconds: Sequence[float]
    others: Mapping[str, Sequence[float]]


class OurPlans:
    """All plans, open at one delay."""

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        """By the names of their plans."""
        self._replicas = replicas

    def sample(self, workload: Workload) -> dict[str, float]:
        """Seconds by plan, once each, in turn. Raises RankFailed."""
        return {name: self._replicas[plan].seconds(work) for name, (plan, work) in ways(workload).items()}


def ways(workload: Workload) -> dict[str, tuple[str, Workload]]:
    """By what is reported: the plan, and the workload as that computes it."""
    found = {plan.name: (plan.name, workload) for plan in (TENSOR, SEQUENCE)}
    if workload.phase == "decode":
        parts = min(_NUM_STAGES, workload.num_sequences)
        return found | {PIPELINE.name: (PIPELINE.name, replace(workload, num_parts=parts))}
    for parts in range(1, _MOST_PIECES + 1):
        if parts == 1 or workload.num_tokens >= parts * _LEAST_PIECE:
            name = PIPELINE.name if parts == 1 else f"{PIPELINE.name}/{parts}"
            found[name] = (PIPELINE.name, replace(workload, num_parts=parts))
    return found


def workloads(sizes: Sizes) -> list[Workload]:
    """Those that plans are compared by."""
    return [*map(sizes.decode, sizes.plan_batches), *map(prefill, sizes.plan_prefills)]


@contextmanager
def our_plans(cluster: Cluster, model: Path, sizes: Sizes) -> Iterator[OurPlans]:
    """Every plan open for the length of the block; what their ranks choose by is measured at the delay of now.

    Raises RankFailed.
    """
    slots, budget = sizes.slots(*workloads(sizes)), max(sizes.plan_prefills)
    with ExitStack() as stack:
        yield OurPlans(
            {
                plan.name: stack.enter_context(cluster.replica(model, plan, num_slots=slots, token_budget=budget))
                for plan in PLANS
            }
        )


def best_of(samples: Mapping[str, Sequence[float]]) -> Best:
    """The best plan of all that were sampled."""
    plan = fastest(samples)
    return Best(plan=plan, seconds=samples[plan], others=samples)


def measure_ours(cluster: Cluster, model: Path, sizes: Sizes) -> dict[tuple[str, float], Best]:
    """The best plan by the name of the workload (``decode_b1``, ``prefill_512``) and the delay, in seconds one way.

    Workloads and plans take turns in every repeat, after a round that is not counted. Raises RankFailed.
    """
    found: dict[tuple[str, float], Best] = {}
    for delay_s in sizes.delays_s:
        cluster.set_delay(delay_s)
        taken: dict[str, dict[str, list[float]]] = {work.name: {} for work in workloads(sizes)}
        with our_plans(cluster, model, sizes) as ours:
            for repeat in range(sizes.repeats + 1):
                for work in workloads(sizes):
                    for plan, seconds in ours.sample(work).items():
                        if repeat:
                            taken[work.name].setdefault(plan, []).append(seconds)
        found |= {(name, delay_s): best_of(samples) for name, samples in taken.items()}
    return found


def report_ours(found: Mapping[tuple[str, float], Best]) -> Findings:
    """``ours_{workload}_{delay}``: milliseconds of the best plan; and a table and a picture of all plans."""
    metrics: dict[str, Metric] = {}
    rows, plans = [], {}
    for (name, delay_s), best in found.items():
        key = f"ours_{name}_{delay_name(delay_s)}"
        metrics[key], plans[key] = milliseconds(best.seconds), best.plan
        others = ", ".join(f"{plan} {cell(seconds)}" for plan, seconds in best.others.items() if plan != best.plan)
        rows.append((name, delay_name(delay_s), best.plan, cell(best.seconds), others))
    columns = ("workload", "one way", "best plan", "ms", "others, ms")
    return Findings(
        metrics=metrics,
        tables=[Rows(title="our plans: ms a decode step, or a prefill", columns=columns, rows=rows)],
        curves=[_curve(name, found) for name in dict.fromkeys(name for name, _ in found)],
        settings={"ours_plans": plans},
    )


def _curve(name: str, found: Mapping[tuple[str, float], Best]) -> Curve:
    samples = {
        (plan, delay_s): seconds
        for (its_name, delay_s), best in found.items()
        if its_name == name
        for plan, seconds in best.others.items()
    }
    return over_delay(f"our plans: {name}", samples)
