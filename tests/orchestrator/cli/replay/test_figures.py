"""The figures of a replay, from outcomes that are known."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.replay.curves import curves
from orchestrator.cli.replay.figures import NO_TOKENS, distribution, sum_up
from orchestrator.cli.replay.outcome import OK, STOPPED, Outcome
from orchestrator.cli.replay.percentiles import percentile
from orchestrator.cli.replay.schedule import PlannedRequest, Schedule
from orchestrator.cli.replay.slo import MULTIPLES, IdlePoint, Slo, idle_at, slowdowns


def outcome(index: int = 0, **fields: Any) -> Outcome:
    """A request due at 1 s and sent 0.25 s late, with tokens at 2, 2.5 and 4 s."""
    whole: dict[str, Any] = {
        "due_s": 1.0, "sent_s": 1.25, "ended_s": 4.5, "code": OK, "token_times_s": (2.0, 2.5, 4.0),
        "prompt_tokens": 100, "cached_tokens": 40,
    }  # fmt: skip
    return Outcome(index=index, **whole | fields)


def failed(code: str, **fields: Any) -> Outcome:
    return outcome(code=code, token_times_s=(), prompt_tokens=100, cached_tokens=0, **fields)


def scheduled(count: int, shared_tokens: int = 0) -> Schedule:
    requests = [PlannedRequest(index=i, due_s=0.0, prompt_tokens=100, answer_tokens=3) for i in range(count)]
    return Schedule(requests=tuple(requests), num_clipped=1, shared_tokens=shared_tokens)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.sampled_from([0, 50, 90, 99, 100]))
def test_a_percentile_is_that_of_numpy(samples: list[float], percent: int) -> None:
    assert math.isclose(
        percentile(sorted(samples), percent), float(np.percentile(samples, percent)), rel_tol=1e-9, abs_tol=1e-6
    )


def test_a_distribution_of_nothing_is_none() -> None:
    assert distribution([]) is None


def test_latencies_count_from_when_a_request_was_due() -> None:
    figures = sum_up(scheduled(1), [outcome()])
    assert figures.ttft is not None and figures.ttft.p50 == 1.0
    assert figures.e2e is not None and figures.e2e.p99 == 3.5
    assert figures.tbt is not None and (figures.tbt.count, figures.tbt.mean, figures.tbt.max) == (2, 1.0, 1.5)
    assert figures.tpot is not None and figures.tpot.p50 == 1.0
    assert figures.lateness is not None and figures.lateness.max == 0.25
    assert (figures.span_s, figures.answer_tokens, figures.per_s(figures.answer_tokens)) == (4.5, 3, 3 / 4.5)


def test_errors_count_by_code_and_leave_latencies_alone() -> None:
    outcomes = [
        outcome(),
        failed("UNAVAILABLE", detail="one"),
        failed("RESOURCE_EXHAUSTED"),
        failed("UNAVAILABLE", detail="two"),
        failed(STOPPED),
        failed(OK),
    ]
    figures = sum_up(scheduled(8), outcomes)
    assert figures.errors == {"UNAVAILABLE": 2, "RESOURCE_EXHAUSTED": 1, NO_TOKENS: 1}
    assert figures.first_error["UNAVAILABLE"] == "one"
    assert (figures.num_planned, figures.num_sent, figures.num_completed) == (8, 6, 1)
    assert (figures.num_failed, figures.num_stopped) == (4, 1)
    assert figures.ttft is not None and figures.ttft.count == 1
    assert figures.lateness is not None and figures.lateness.count == 6


def test_prefix_hits_stand_beside_what_the_trace_shares() -> None:
    figures = sum_up(scheduled(4, shared_tokens=300), [outcome(), outcome(1, cached_tokens=0), failed("UNAVAILABLE")])
    assert (figures.prefix_hit_rate, figures.shared_rate) == (0.2, 0.75)


def test_of_nothing_there_is_nothing_to_tell() -> None:
    figures = sum_up(scheduled(1), [], Slo(ttft_s=1.0))
    assert (figures.ttft, figures.tbt, figures.e2e, figures.lateness, figures.prefix_hit_rate) == (None,) * 5
    assert figures.per_s(5) == 0.0
    assert figures.goodput is not None and (figures.goodput.num_kept, figures.goodput.share) == (0, 0.0)
    assert all(curve.xs == curve.ys == () for curve in curves([]))


@pytest.mark.parametrize(
    ("slo", "kept"),
    [
        (Slo(ttft_s=1.0), True),
        (Slo(ttft_s=0.99), False),
        (Slo(tbt_s=1.0), True),
        (Slo(tbt_s=0.99), False),
        (Slo(ttft_s=1.0, tbt_s=0.99), False),
        (Slo(ttft_s=1.0, tbt_s=1.0), True),
    ],
)
def test_a_request_is_good_that_keeps_both_bounds(slo: Slo, kept: bool) -> None:
    assert slo.is_kept(outcome()) is kept
    assert not slo.is_kept(failed("UNAVAILABLE"))


def test_goodput_counts_failures_as_not_kept_and_stopped_requests_not_at_all() -> None:
    outcomes = [outcome(), outcome(1, token_times_s=(3.0,)), failed("UNAVAILABLE"), failed(STOPPED)]
    good = sum_up(scheduled(4), outcomes, Slo(ttft_s=1.5, tbt_s=1.0)).goodput
    assert good is not None
    assert (good.num_kept, good.share, good.per_s) == (1, 1 / 3, 1 / 4.5)


def test_what_an_idle_service_takes_is_interpolated_between_lengths() -> None:
    points = [
        IdlePoint(prompt_tokens=10, ttft_s=0.1, tbt_s=0.01),
        IdlePoint(prompt_tokens=110, ttft_s=1.1, tbt_s=0.03),
    ]
    assert [idle_at(points, length).ttft_s for length in (5, 10, 110, 200)] == [0.1, 0.1, 1.1, 1.1]
    between = idle_at(points, 60)
    assert (between.ttft_s, between.tbt_s) == (pytest.approx(0.6), pytest.approx(0.02))


def test_slowdowns_are_multiples_of_the_same_request_alone() -> None:
    idle = [IdlePoint(prompt_tokens=100, ttft_s=0.5, tbt_s=0.25)]
    found = {(item.metric, item.percent): item for item in slowdowns([outcome(), failed("UNAVAILABLE")], idle)}
    assert {(metric, percent) for metric, limits in MULTIPLES.items() for percent in limits} == set(found)
    assert found["ttft", 50].measured == 2.0 and found["ttft", 50].is_kept
    assert found["tbt", 99].measured == 4.0 and found["tbt", 99].is_kept and not found["tbt", 90].is_kept
    assert found["e2e", 50].measured == 3.5
    assert slowdowns([failed("UNAVAILABLE")], idle) == ()


def test_curves_are_shares_of_samples_and_counts_of_requests() -> None:
    first, tbt, total, running = curves(
        [outcome(), outcome(1, due_s=2.0, sent_s=2.0, token_times_s=(2.5,), ended_s=3.0)]
    )
    assert (first.xs, first.ys) == ((500.0, 1000.0), (0.5, 1.0))
    assert (tbt.xs, tbt.ys) == ((500.0, 1500.0), (0.5, 1.0))
    assert (total.xs, total.ys) == ((1000.0, 3500.0), (0.5, 1.0))
    assert (running.xs, running.ys) == ((1.25, 2.0, 3.0, 4.5), (1.0, 2.0, 1.0, 0.0))


def test_a_curve_of_many_samples_is_thinned_and_keeps_its_end() -> None:
    times = tuple(float(place * place) for place in range(5001))
    tbt = curves([outcome(token_times_s=times)])[1]
    assert len(tbt.xs) <= 2001 and tbt.ys[-1] == 1.0 and tbt.xs[-1] == (times[-1] - times[-2]) * 1e3
