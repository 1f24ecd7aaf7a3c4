"""What a long prompt does to answers that run, on two threads in all.

Split, one thread computes prompts and one answers. Mixed, both threads compute both: a prompt in one step, in steps of
as many tokens as half a second allows, or in small ones.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from orchestrator.cli.replay.outcome import Outcome
from orchestrator.cli.replay.percentiles import percentile
from orchestrator.cli.replay.schedule import PlannedRequest
from tests.benchmarks.disaggregation.split_served import MAX_NUM_SEQS, MIXED, Arm, served, split
from tests.benchmarks.disaggregation.split_sizes import Sizes
from tests.benchmarks.parallel.parallel_figures import Findings
from tests.benchmarks.report import Metric, Rows, median, shown

SPLIT, UNCHUNKED, CHUNKED, SMALL_CHUNKS = "split", "unchunked", "chunked", "small_chunks"
MIXED_WAYS = (UNCHUNKED, CHUNKED, SMALL_CHUNKS)
_SMALL_BUDGET = 64
SHORT_PROMPT = 16
# Long enough for every window; they are cancelled.
ANSWER_TOKENS = 3500
_BEGIN_S = 2.0
# How much longer than a prompt takes alone, in the split deployment, the next one comes after it.
_PERIOD = 1.25
_LEAST_PERIOD_S = 0.25


def arms(sizes: Sizes) -> list[Arm]:
    """Returns the deployments that are compared."""
    whole = {**MIXED, "token_budget": sizes.long_prompt + MAX_NUM_SEQS}
    return [
        Arm(name=SPLIT, workers={"one": 1, "two": 1}, serving=split()),
        Arm(name=UNCHUNKED, workers={"both": 2}, serving=whole),
        Arm(name=CHUNKED, workers={"both": 2}, serving=MIXED),
        Arm(name=SMALL_CHUNKS, workers={"both": 2}, serving={**MIXED, "token_budget": _SMALL_BUDGET}),
    ]


def requests_of(sizes: Sizes, period_s: float) -> list[PlannedRequest]:
    """Returns answers that run, and then prompts that come every so often."""
    streams = [
        PlannedRequest(index=index, due_s=0.0, prompt_tokens=SHORT_PROMPT, answer_tokens=ANSWER_TOKENS)
        for index in range(sizes.num_streams)
    ]
    long = [
        PlannedRequest(
            index=sizes.num_streams + number,
            due_s=_BEGIN_S + number * period_s,
            prompt_tokens=sizes.long_prompt,
            answer_tokens=1,
        )
        for number in range(sizes.num_long)
    ]
    return streams + long


def gaps_in(outcomes: Sequence[Outcome], start_s: float, stop_s: float) -> list[float]:
    """Returns the times between tokens of answers, of tokens that came within the window, in their order of size."""
    found = [
        after - before
        for outcome in outcomes
        for before, after in pairwise(outcome.token_times_s)
        if start_s <= after < stop_s
    ]
    return sorted(found)


def measure_gaps(sizes: Sizes) -> Findings:
    """Measures all in turn, in each repeat."""
    found: dict[str, list[list[float]]] = {arm.name: [] for arm in arms(sizes)}
    firsts: dict[str, list[float]] = {arm.name: [] for arm in arms(sizes)}
    with served(*arms(sizes), shape=sizes.shape, kv_cache=sizes.kv_cache) as deployments:
        alone = PlannedRequest(index=0, due_s=0.0, prompt_tokens=sizes.long_prompt, answer_tokens=2)
        points = {it.arm.name: it.idle([alone], seed=1)[0] for it in deployments}
        period_s = max(_LEAST_PERIOD_S, _PERIOD * points[SPLIT].ttft_s)
        requests = requests_of(sizes, period_s)
        stop_s = _BEGIN_S + sizes.num_long * period_s
        for repeat in range(sizes.repeats):
            for deployment in deployments:
                outcomes = deployment.send(requests, seed=2 + repeat, for_s=stop_s)
                streams, long = outcomes[: sizes.num_streams], outcomes[sizes.num_streams :]
                found[deployment.arm.name].append(gaps_in(streams, _BEGIN_S, stop_s))
                firsts[deployment.arm.name] += [outcome.ttft_s for outcome in long if outcome.is_completed]
        settings = {"gaps_period_s": period_s, "gaps_failed_transfers": deployments[0].num_failed_transfers()}
    return dataclasses.replace(findings(found, firsts, period_s), settings=settings)


def findings(
    gaps: Mapping[str, Sequence[Sequence[float]]], firsts: Mapping[str, Sequence[float]], period_s: float
) -> Findings:
    """Returns the figures of gaps by arm and repeat, each in their order of size, and of times to a first token."""
    metrics: dict[str, Metric] = {}
    for name in MIXED_WAYS:
        for percent in (50, 99):
            ratios = [
                percentile(theirs, percent) / percentile(ours, percent)
                for theirs, ours in zip(gaps[name], gaps[SPLIT], strict=True)
            ]
            metrics[f"gap_p{percent}_vs_{name}"] = median(ratios, "x")
        ratios = [theirs[-1] / ours[-1] for theirs, ours in zip(gaps[name], gaps[SPLIT], strict=True)]
        metrics[f"gap_max_vs_{name}"] = median(ratios, "x")
        if firsts[name] and firsts[SPLIT]:
            waits = statistics.median(firsts[SPLIT]) / statistics.median(firsts[name])
            metrics[f"long_prompt_first_token_over_{name}"] = Metric(value=waits, unit="x", samples=len(firsts[SPLIT]))
    rows = [
        [
            name,
            *(shown(median([1e3 * percentile(found, percent) for found in each], "ms"), 1) for percent in (50, 99)),
            shown(median([1e3 * found[-1] for found in each], "ms"), 1),
            f"{len(each[0])}",
            shown(median(firsts[name], "s")) if firsts[name] else "none in time",
        ]
        for name, each in gaps.items()
    ]
    columns = ["deployment", "P50 gap", "P99 gap", "longest gap", "gaps", "first token of the prompts"]
    title = f"Between tokens of answers, while a prompt comes every {period_s:.2f} s"
    return Findings(metrics=metrics, tables=[Rows(title=title, columns=columns, rows=rows)])
