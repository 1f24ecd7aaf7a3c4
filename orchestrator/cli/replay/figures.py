"""Sums up what a replay measured: distributions of latencies, rates, errors, prefix hits, goodput. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.cli.replay.outcome import OK, Outcome
from orchestrator.cli.replay.percentiles import percentile
from orchestrator.cli.replay.schedule import Schedule
from orchestrator.cli.replay.slo import Goodput, Slo, goodput

NO_TOKENS = "NO_TOKENS"
"""A request that ended well and had no token counts under this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How a latency is distributed. In seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Holds what a replay measured.

    Latencies are those of completed requests. Times to the first token and to the end count from when a request was
    due, so that what waited in this client counts too; ``lateness`` says how long that was.

    Attributes:
        num_planned: requests of the schedule.
        num_sent: requests that were sent.
        num_completed: requests that got their whole answer.
        num_stopped: requests that were running when the replay was stopped.
        errors: how many requests failed, by the name of their gRPC status.
        first_error: for each of these names, what the first of them said.
        num_clipped: requests that were shortened to fit the context.
        span_s: from the start of the replay to the end of the last request.
        prompt_tokens: of completed requests.
        cached_tokens: how many of these were found in the prefix cache.
        shared_tokens: how many prompt tokens of the schedule a perfect prefix cache would find.
        planned_prompt_tokens: prompt tokens of the schedule.
        answer_tokens: tokens that came, of whatever request.
        ttft: time to the first token; None, like those below, where there is none to measure.
        tbt: time between tokens: each token's time after the one before it. Tokens that come in one message have none
            between them.
        tpot: mean time between the tokens of a request, of each that has two.
        e2e: time to the end.
        lateness: how much later than due requests were sent, of all that were.
        goodput: how many requests kept the bounds; None where there are none.
    """

    num_planned: int
    num_sent: int
    num_completed: int
    num_stopped: int
    errors: Mapping[str, int]
    first_error: Mapping[str, str]
    num_clipped: int
    span_s: float
    prompt_tokens: int
    cached_tokens: int
    shared_tokens: int
    planned_prompt_tokens: int
    answer_tokens: int
    ttft: Distribution | None
    tbt: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    lateness: Distribution | None
    goodput: Goodput | None

    @property
    def num_failed(self) -> int:
        """How many requests failed."""
        return sum(self.errors.values())

    @property
    def prefix_hit_rate(self) -> float | None:
        """The share of the completed requests' prompt tokens that was found in the cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    @property
    def shared_rate(self) -> float | None:
        """The share that a perfect cache would find of all prompt tokens of the schedule."""
        return self.shared_tokens / self.planned_prompt_tokens if self.planned_prompt_tokens else None

    def per_s(self, amount: int) -> float:
        """Returns ``amount`` for each second of the replay; 0 where it took none."""
        return amount / self.span_s if self.span_s > 0 else 0.0


def sum_up(schedule: Schedule, outcomes: Sequence[Outcome], slo: Slo | None = None) -> Figures:
    """Returns the figures of the requests of ``schedule`` that were sent."""
    completed = [outcome for outcome in outcomes if outcome.is_completed]
    span_s = max((outcome.ended_s for outcome in outcomes), default=0.0)
    errors: Counter[str] = Counter()
    first_error: dict[str, str] = {}
    for outcome in outcomes:
        if not outcome.is_completed and not outcome.is_stopped:
            code = NO_TOKENS if outcome.code == OK else outcome.code
            errors[code] += 1
            first_error.setdefault(code, outcome.detail)
    return Figures(
        num_planned=len(schedule.requests),
        num_sent=len(outcomes),
        num_completed=len(completed),
        num_stopped=sum(outcome.is_stopped for outcome in outcomes),
        errors=dict(errors.most_common()),
        first_error=first_error,
        num_clipped=schedule.num_clipped,
        span_s=span_s,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in completed),
        cached_tokens=sum(outcome.cached_tokens for outcome in completed),
        shared_tokens=schedule.shared_tokens,
        planned_prompt_tokens=sum(request.prompt_tokens for request in schedule.requests),
        answer_tokens=sum(len(outcome.token_times_s) for outcome in outcomes),
        ttft=distribution(outcome.ttft_s for outcome in completed),
        tbt=distribution(gaps_s(completed)),
        tpot=distribution(outcome.tpot_s for outcome in completed if outcome.tpot_s is not None),
        e2e=distribution(outcome.e2e_s for outcome in completed),
        lateness=distribution(outcome.sent_s - outcome.due_s for outcome in outcomes),
        goodput=None if slo is None else goodput(outcomes, slo, span_s=span_s),
    )


def gaps_s(outcomes: Iterable[Outcome]) -> list[float]:
    """Returns the time of each token after the one before it in its answer."""
    return [after - before for outcome in outcomes for before, after in pairwise(outcome.token_times_s)]


def distribution(samples: Iterable[float]) -> Distribution | None:
    """Returns how ``samples`` are distributed; None where there are none."""
    ordered = sorted(samples)
    if not ordered:
        return None
    return Distribution(
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )
