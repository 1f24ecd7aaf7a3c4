"""Judges the latencies of requests: by bounds in seconds, or as multiples of what an idle service takes. Pure.

Bounds give the goodput: the completed requests a second that kept them. Multiples are those of Splitwise (Patel et al.,
ISCA 2024): the slowdown of each request against the same request alone must stay below a limit at the median,
the 90th and the 99th percentile.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.cli.replay.outcome import Outcome
from orchestrator.cli.replay.percentiles import percentile

MULTIPLES: Mapping[str, Mapping[int, float]] = {
    "ttft": {50: 2.0, 90: 3.0, 99: 6.0},
    "tbt": {50: 1.25, 90: 1.5, 99: 5.0},
    "e2e": {50: 1.25, 90: 1.5, 99: 5.0},
}
"""The greatest slowdown that Splitwise allows, by metric and percentile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Bounds on each request, at least one of them.

    Attributes:
        ttft_s: the longest time to the first token, from when the request was due.
        tbt_s: the longest mean time between the tokens of its answer.
    """

    ttft_s: float | None = None
    tbt_s: float | None = None

    def is_kept(self, outcome: Outcome) -> bool:
        """Returns whether a request got its whole answer within the bounds."""
        if not outcome.is_completed:
            return False
        is_prompt = self.ttft_s is None or outcome.ttft_s <= self.ttft_s
        return is_prompt and (self.tbt_s is None or (outcome.tpot_s or 0.0) <= self.tbt_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """How many requests kept the bounds.

    Attributes:
        num_kept: how many did.
        share: of those that were sent; those that failed count as not kept.
        per_s: how many did in each second of the replay.
    """

    num_kept: int
    share: float
    per_s: float


def goodput(outcomes: Sequence[Outcome], slo: Slo, *, span_s: float) -> Goodput:
    """Returns how many of the requests that were sent, in a replay of ``span_s``, kept the bounds.

    Those that were stopped with the replay do not count, as nobody knows how they would have ended.
    """
    judged = [outcome for outcome in outcomes if not outcome.is_stopped]
    num_kept = sum(slo.is_kept(outcome) for outcome in judged)
    share = num_kept / len(judged) if judged else 0.0
    return Goodput(num_kept=num_kept, share=share, per_s=num_kept / span_s if span_s > 0 else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdlePoint:
    """Says how long requests took while the service had no other.

    Attributes:
        tbt_s: the mean time between its tokens.
    """

    prompt_tokens: int
    ttft_s: float
    tbt_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowdown:
    """How much slower requests were than alone, at one percentile.

    Attributes:
        metric: ``ttft``, ``tbt`` (the mean of each request) or ``e2e``.
        percent: which percentile.
        measured: the slowdown.
        limit: the greatest that is allowed.
    """

    metric: str
    percent: int
    measured: float
    limit: float

    @property
    def is_kept(self) -> bool:
        """Whether the limit is kept."""
        return self.measured <= self.limit


def slowdowns(outcomes: Sequence[Outcome], idle: Sequence[IdlePoint]) -> tuple[Slowdown, ...]:
    """Returns the slowdown of completed requests by metric and percentile; none where there are no such requests.

    Args:
        idle: what requests took alone, by increasing length of the prompt, at least one. Between two lengths it is
            interpolated; beyond the last it is taken as that of the last.
    """
    found: dict[str, list[float]] = {metric: [] for metric in MULTIPLES}
    for outcome in outcomes:
        if outcome.is_completed:
            for metric, slowdown in _slowdowns_of(outcome, idle_at(idle, outcome.prompt_tokens)):
                found[metric].append(slowdown)
    return tuple(
        Slowdown(metric=metric, percent=percent, measured=percentile(sorted(found[metric]), percent), limit=limit)
        for metric, limits in MULTIPLES.items()
        for percent, limit in limits.items()
        if found[metric]
    )


def _slowdowns_of(outcome: Outcome, alone: IdlePoint) -> Iterator[tuple[str, float]]:
    yield "ttft", outcome.ttft_s / alone.ttft_s
    if outcome.tpot_s is not None and alone.tbt_s > 0:
        yield "tbt", outcome.tpot_s / alone.tbt_s
    yield "e2e", outcome.e2e_s / (alone.ttft_s + alone.tbt_s * (len(outcome.token_times_s) - 1))


def idle_at(idle: Sequence[IdlePoint], prompt_tokens: int) -> IdlePoint:
    """Returns what a request with a prompt of this length takes alone, interpolated between those of ``idle``."""
    after = bisect_right(idle, prompt_tokens, key=lambda point: point.prompt_tokens)
    if after in (0, len(idle)):
        return idle[max(0, after - 1)]
    low, high = idle[after - 1], idle[after]
    part = (prompt_tokens - low.prompt_tokens) / (high.prompt_tokens - low.prompt_tokens)
    return IdlePoint(
        prompt_tokens=prompt_tokens,
        ttft_s=low.ttft_s + part * (high.ttft_s - low.ttft_s),
        tbt_s=low.tbt_s + part * (high.tbt_s - low.tbt_s),
    )
