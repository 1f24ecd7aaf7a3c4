"""Whom prompts go to, of two mixed replicas one of which is slow: by the time that they take, or by tokens alone.

A cgroup leaves the slow one a share of a core's time. By tokens, the gateway is one that counts both as equally fast.
"""

import random
from collections.abc import Mapping, Sequence

from orchestrator.cli.replay.percentiles import percentile
from orchestrator.cli.replay.schedule import PlannedRequest
from tests.benchmarks.disaggregation.split_served import MIXED, Arm, served
from tests.benchmarks.disaggregation.split_sizes import Sizes
from tests.benchmarks.parallel.parallel_figures import Findings
from tests.benchmarks.report import Metric, Rows, median, shown
from tests.netlab.requirements import missing

BY_TIME, BY_TOKENS = "by time", "by tokens"
WORKERS = {"fast": 1, "slow": 1}
ARMS = (
    Arm(name=BY_TIME, workers=WORKERS, serving=MIXED),
    Arm(name=BY_TOKENS, workers=WORKERS, serving=MIXED, by_tokens=True),
)
ANSWER_TOKENS = 2
_NUM_WARM = 12
_PERCENTS = (50, 90, 99)


def arrivals(sizes: Sizes, rate_per_s: float, *, seed: int) -> list[PlannedRequest]:
    """Returns prompts that come by chance, each independently of all others."""
    draw = random.Random(seed)
    found, due_s = [], 0.0
    for index in range(sizes.num_routed):
        found.append(_prompt(sizes, index, due_s))
        due_s += draw.expovariate(rate_per_s)
    return found


def _prompt(sizes: Sizes, index: int, due_s: float) -> PlannedRequest:
    return PlannedRequest(
        index=index, due_s=due_s, prompt_tokens=sizes.routed_prompt, answer_tokens=ANSWER_TOKENS
    )  # fmt: skip


def rate_of(sizes: Sizes, alone_s: float) -> float:
    """Returns the prompts a second that are the wanted load of both replicas, where the fast one takes ``alone_s``."""
    return sizes.load * (1.0 + sizes.routed_share) / alone_s


def measure_routing(sizes: Sizes) -> Findings:
    """Measures both ways in turn, in each repeat, with the same prompts at the same times."""
    reason = missing(cpu_shares=True)
    if reason is not None:
        return Findings(left_out={"routing_by_time_gain": reason})
    found: dict[str, list[list[float]]] = {arm.name: [] for arm in ARMS}
    with served(*ARMS, shape=sizes.shape, kv_cache=sizes.kv_cache) as deployments:
        warm = [_prompt(sizes, index, 0.0) for index in range(_NUM_WARM)]
        for deployment in deployments:
            deployment.send(warm, seed=0)
        alone_s = min(deployment.idle(warm[:1], seed=1)[0].ttft_s for deployment in deployments)
        for deployment in deployments:
            deployment.slow_down("slow", sizes.routed_share)
            deployment.send(warm, seed=2)
        rate_per_s = rate_of(sizes, alone_s)
        for repeat in range(sizes.repeats):
            requests = arrivals(sizes, rate_per_s, seed=repeat)
            for deployment in deployments:
                outcomes = deployment.send(requests, seed=3 + repeat)
                found[deployment.arm.name].append(sorted(outcome.ttft_s for outcome in outcomes))
    return findings(found, rate_per_s)


def findings(found: Mapping[str, Sequence[Sequence[float]]], rate_per_s: float) -> Findings:
    """Returns the figures of times to a first token by way and repeat, each in their order of size."""
    metrics: dict[str, Metric] = {}
    for percent in _PERCENTS:
        ratios = [
            percentile(theirs, percent) / percentile(ours, percent)
            for theirs, ours in zip(found[BY_TOKENS], found[BY_TIME], strict=True)
        ]
        metrics["routing_by_time_gain" + ("" if percent == 99 else f"_p{percent}")] = median(ratios, "x")
    rows = [
        [name, *(shown(median([percentile(times, percent) for times in each], "s"), 3) for percent in _PERCENTS)]
        for name, each in found.items()
    ]
    title = f"First tokens of {rate_per_s:.2f} prompts a second, of two replicas one of which is slow"
    columns = ["prompts are routed", *(f"P{percent}" for percent in _PERCENTS)]
    return Findings(
        metrics=metrics,
        tables=[Rows(title=title, columns=columns, rows=rows)],
        settings={"routing_rate_per_s": rate_per_s},
    )
