"""Requests of a trace that keep Splitwise's limits: one host for prompts and one for answers, against two for both.

The two that are for one of them help each other under load, as a pool does that is configured so (``auto``).

Hosts have one thread each. On the second of the unequal ones, that for answers, code is compiled for a lesser kind of
CPU: it computes far more slowly, but reads memory as fast, as an older GPU does beside a newer one. A request is judged
by its slowdown against the same request alone at two equal hosts that compute both.
"""

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kernels.cpu.machine.target import runnable_targets
from orchestrator.cli.replay.idle import idle_requests
from orchestrator.cli.replay.outcome import Outcome
from orchestrator.cli.replay.schedule import PlannedRequest, Schedule, make_schedule
from orchestrator.cli.replay.slo import MULTIPLES, IdlePoint, idle_at, slowdowns
from orchestrator.cli.replay.trace import TraceRequest, read_trace
from tests.benchmarks.disaggregation.split_served import MIXED, Arm, Served, served, split
from tests.benchmarks.disaggregation.split_sizes import Sizes
from tests.benchmarks.engine.engine_models import checkpoint, read_spec
from tests.benchmarks.parallel.parallel_figures import Findings
from tests.benchmarks.report import REPOSITORY, Curve, Metric, Rows, median, shown

EXCERPT = REPOSITORY / "deploy/traces/azure-conversation.csv"
WORKERS = {"one": 1, "two": 1}
ARMS = (
    Arm(name="split", workers=WORKERS, serving=split(disaggregation="auto")),
    Arm(name="mixed", workers=WORKERS, serving=MIXED),
)
SLOW = "two"
PERCENTS = tuple(MULTIPLES["e2e"])
_NUM_WARM = 4
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a deployment did with the trace at one rate.

    Attributes:
        per_s: the requests a second that kept the limits, by the column of Splitwise's table.
        share: of the requests that were sent, by that column.
        num_limits: how many of the nine limits of Splitwise's table were kept.
    """

    per_s: Mapping[int, float]
    share: Mapping[int, float]
    num_limits: int


Turns = Mapping[tuple[str, float], Sequence[Turn]]


def drawn(excerpt: Sequence[TraceRequest], num_requests: int, *, seed: int) -> list[TraceRequest]:
    """Returns a longer trace: times between requests, and lengths of them, drawn from those of an excerpt."""
    draw = random.Random(seed)
    gaps_s = [after.at_s - before.at_s for before, after in pairwise(excerpt)]
    found, at_s = [], 0.0
    for _ in range(num_requests):
        like = draw.choice(excerpt)
        found.append(TraceRequest(at_s=at_s, prompt_tokens=like.prompt_tokens, answer_tokens=like.answer_tokens))
        at_s += draw.choice(gaps_s)
    return found


def trace_of(sizes: Sizes) -> Sequence[TraceRequest]:
    """Returns the trace that is replayed."""
    if sizes.trace is not None:
        return read_trace(sizes.trace)
    return drawn(read_trace(EXCERPT), sizes.num_requests, seed=_SEED)


def is_kept(outcome: Outcome, idle: Sequence[IdlePoint], percent: int) -> bool:
    """Returns whether a request got its whole answer, and no slower than the limits of that column allow."""
    if not outcome.is_completed:
        return False
    alone = idle_at(idle, outcome.prompt_tokens)
    alone_s = alone.ttft_s + alone.tbt_s * (len(outcome.token_times_s) - 1)
    slower = {"ttft": outcome.ttft_s / alone.ttft_s, "e2e": outcome.e2e_s / alone_s}
    if outcome.tpot_s is not None and alone.tbt_s > 0:
        slower["tbt"] = outcome.tpot_s / alone.tbt_s
    return all(slowdown <= MULTIPLES[metric][percent] for metric, slowdown in slower.items())


def judged(outcomes: Sequence[Outcome], idle: Sequence[IdlePoint]) -> Turn:
    """Returns what a replay comes to."""
    num_kept = {percent: sum(is_kept(outcome, idle, percent) for outcome in outcomes) for percent in PERCENTS}
    span_s = max(outcome.ended_s for outcome in outcomes)
    return Turn(
        per_s={percent: num / span_s for percent, num in num_kept.items()},
        share={percent: num / len(outcomes) for percent, num in num_kept.items()},
        num_limits=sum(limit.is_kept for limit in slowdowns(outcomes, idle)),
    )


def _schedule(sizes: Sizes, rate: float) -> Schedule:
    most = read_spec(checkpoint(sizes.shape)).max_context_tokens
    return make_schedule(
        trace_of(sizes), rate=rate, scale=sizes.scale, max_context_tokens=most, limit=sizes.num_requests
    )


def measure_goodput(sizes: Sizes) -> Findings:
    """Measures both deployments in turn, in each repeat and at each rate, on equal hosts and then on unequal ones."""
    turns: dict[str, Turns] = {}
    most = read_spec(checkpoint(sizes.shape)).max_context_tokens
    alone = idle_requests(_schedule(sizes, sizes.rates[0]), max_context_tokens=most)
    with served(*ARMS, shape=sizes.shape, kv_cache=sizes.kv_cache) as deployments:
        for request in alone:
            _warm(deployments, request.prompt_tokens)
        idle = deployments[-1].idle(alone, seed=1)
        turns["equal"] = _measure(deployments, sizes, idle, "equal")
        num_failed = sum(deployment.num_failed_transfers() for deployment in deployments)
    if sizes.slow_target not in (target.name for target in runnable_targets()):
        reason = f"this CPU does not execute code for {sizes.slow_target}"
        return findings(turns, sizes, {"goodput_split_over_mixed_unequal": reason})
    unequal = [dataclasses.replace(arm, targets={SLOW: sizes.slow_target}) for arm in ARMS]
    with served(*unequal, shape=sizes.shape, kv_cache=sizes.kv_cache) as deployments:
        for request in alone:
            _warm(deployments, request.prompt_tokens)
        turns["unequal"] = _measure(deployments, sizes, idle, "unequal")
        num_failed += sum(deployment.num_failed_transfers() for deployment in deployments)
        slow, fast = deployments[-1].steps(SLOW), deployments[-1].steps("one")
    found = findings(turns, sizes, {})
    metrics = dict(found.metrics) | slower(slow, fast)
    return dataclasses.replace(found, metrics=metrics, settings={**found.settings, "failed_transfers": num_failed})


def slower(slow: Mapping[int, float], fast: Mapping[int, float]) -> dict[str, Metric]:
    """Returns how many times as long the slow worker's steps take, of the fewest and the most tokens of both."""
    sizes = sorted(slow.keys() & fast.keys())
    return {
        f"unequal_step_of_{num_tokens}": Metric(value=slow[num_tokens] / fast[num_tokens], unit="x")
        for num_tokens in sorted({*sizes[:1], *sizes[-1:]})
    }


def _measure(deployments: Sequence[Served], sizes: Sizes, idle: Sequence[IdlePoint], hosts: str) -> Turns:
    turns: dict[tuple[str, float], list[Turn]] = {(arm.name, rate): [] for arm in ARMS for rate in sizes.rates}
    for repeat in range(sizes.repeats):
        for rate in sizes.rates:
            for deployment in deployments:
                print(f"measuring: goodput, {hosts} hosts, {deployment.arm.name}, rate {rate:g}", flush=True)
                outcomes = deployment.send(_schedule(sizes, rate).requests, seed=2 + repeat, drops=True)
                turns[deployment.arm.name, rate].append(judged(outcomes, idle))
    return turns


def _warm(deployments: Sequence[Served], prompt_tokens: int) -> None:
    """Has every replica compute, so that its speed is known."""
    for deployment in deployments:
        deployment.send(
            [
                PlannedRequest(index=number, due_s=0.0, prompt_tokens=prompt_tokens, answer_tokens=4)
                for number in range(_NUM_WARM)
            ],
            seed=0,
        )


def findings(turns: Mapping[str, Turns], sizes: Sizes, left_out: Mapping[str, str]) -> Findings:
    """Returns the figures of turns by hosts, deployment and rate."""
    metrics: dict[str, Metric] = {}
    missed = dict(left_out)
    for hosts, found in turns.items():
        for percent in PERCENTS:
            ending = "" if percent == sizes.slo_percent else f"_p{percent}"
            best = {arm.name: _best(found, arm.name, sizes, percent) for arm in ARMS}
            metrics |= {
                f"goodput_{name}_{hosts}{ending}": median(values, "requests/s") for name, values in best.items()
            }
            key = f"goodput_split_over_mixed_{hosts}{ending}"
            if all(best["mixed"]):
                metrics[key] = median([a / b for a, b in zip(best["split"], best["mixed"], strict=True)], "x")
            else:
                missed[key] = "the mixed deployment kept the limits of no request in some repeat, at no rate"
    return Findings(
        metrics=metrics,
        tables=[_table(turns, sizes)],
        curves=[curve for hosts, found in turns.items() for curve in _curves(hosts, found, sizes)],
        left_out=missed,
        settings={"replayed": str(sizes.trace or f"drawn from {EXCERPT.name} of deploy/traces")},
    )


def _table(turns: Mapping[str, Turns], sizes: Sizes) -> Rows:
    rows = []
    for hosts, found in turns.items():
        for (name, rate), each in found.items():
            what = f"{hosts}, {name}, {rate:g} times as recorded"
            per_s = shown(median([it.per_s[sizes.slo_percent] for it in each], "per s"))
            shares = [shown(median([100 * it.share[percent] for it in each], "%"), 0) for percent in PERCENTS]
            rows.append([what, per_s, *shares, " ".join(str(it.num_limits) for it in each)])
    title = "Requests that keep Splitwise's limits, those of the median or of another percentile"
    per_s_title = f"goodput, P{sizes.slo_percent}"
    kept = [f"keep P{percent}" for percent in PERCENTS]
    columns = ["hosts, deployment, rate", per_s_title, *kept, "limits kept of 9, by repeat"]
    return Rows(title=title, columns=columns, rows=rows)


def _curves(hosts: str, found: Turns, sizes: Sizes) -> list[Curve]:
    """Returns a picture of the shares by rate, where there are several and none is 0, as its axes are logarithmic."""
    at = sizes.slo_percent
    lines = {
        arm.name: [
            (rate, 100 * statistics.median(it.share[at] for it in found[arm.name, rate])) for rate in sizes.rates
        ]
        for arm in ARMS
    }
    if len(sizes.rates) < 2 or not all(share > 0 for line in lines.values() for _, share in line):
        return []
    labels = {"x_label": "times as fast as recorded", "y_label": "% that keep the limits"}
    return [Curve(title=f"{hosts} hosts", **labels, lines=lines)]


def _best(found: Turns, name: str, sizes: Sizes, percent: int) -> list[float]:
    """Returns the greatest goodput over all rates, of each repeat, by a column of Splitwise's table."""
    return [max(found[name, rate][repeat].per_s[percent] for rate in sizes.rates) for repeat in range(sizes.repeats)]
