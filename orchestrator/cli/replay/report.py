"""Writes what a replay measured: as a table, as lines of ``key=value`` pairs, or as one JSON document. Pure."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.brief import brief
from orchestrator.cli.replay.figures import Distribution, Figures
from orchestrator.cli.replay.slo import Slo, Slowdown
from orchestrator.key_values import key_values

_NAMES = {
    "ttft": "time to first token (TTFT)",
    "tbt": "time between tokens (TBT)",
    "tpot": "mean TBT of a request",
    "e2e": "end to end (E2E)",
    "lateness": "sent late by",
}
_DECIMALS = 6
_STATISTICS = ("mean", "p50", "p90", "p99", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """Holds what is told of a replay.

    Attributes:
        settings: what it was run with, by the names of its options.
        slo: the bounds of its goodput; None where there are none.
        slowdowns: against an idle service; empty where that was not measured.
        is_stopped: whether it was stopped before its end.
    """

    figures: Figures
    settings: Mapping[str, object]
    slo: Slo | None = None
    slowdowns: Sequence[Slowdown] = ()
    is_stopped: bool = False


def _latencies(figures: Figures) -> dict[str, Distribution]:
    """Returns the distributions that there are, by name."""
    every = {name: getattr(figures, name) for name in _NAMES}
    return {name: found for name, found in every.items() if found is not None}


def json_text(report: ReplayReport) -> str:
    """Returns one line of JSON with stable names. Times are in seconds; what was not measured is null."""
    figures = report.figures
    document = {
        "settings": dict(report.settings),
        "interrupted": report.is_stopped,
        "requests": _requests(figures),
        "errors": {
            code: {"count": count, "first": figures.first_error[code]} for code, count in figures.errors.items()
        },
        "span_s": figures.span_s,
        "requests_per_s": figures.per_s(figures.num_completed),
        "prompt_tokens_per_s": figures.per_s(figures.prompt_tokens),
        "answer_tokens_per_s": figures.per_s(figures.answer_tokens),
        **{f"{name}_s": None for name in _NAMES},
        **{f"{name}_s": asdict(found) for name, found in _latencies(figures).items()},
        "prefix": _prefix(figures),
        "slo": None if report.slo is None else asdict(report.slo),
        "goodput": None if figures.goodput is None else asdict(figures.goodput),
        "slowdowns": [asdict(item) | {"kept": item.is_kept} for item in report.slowdowns],
    }
    return json.dumps(_rounded(document), separators=(",", ":"), allow_nan=False)


def _rounded(value: object) -> object:
    """Returns a JSON value whose numbers have no more decimals than microseconds need."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, _DECIMALS) if isinstance(value, float) else value


def _requests(figures: Figures) -> dict[str, int]:
    return {
        "planned": figures.num_planned,
        "sent": figures.num_sent,
        "completed": figures.num_completed,
        "failed": figures.num_failed,
        "stopped": figures.num_stopped,
        "clipped": figures.num_clipped,
    }


def _prefix(figures: Figures) -> dict[str, float | int | None]:
    return {
        "prompt_tokens": figures.prompt_tokens,
        "cached_tokens": figures.cached_tokens,
        "hit_rate": figures.prefix_hit_rate,
        "shared_in_trace": figures.shared_rate,
    }


def lines(report: ReplayReport) -> Iterator[str]:
    """Yields lines of ``key=value`` pairs. Times are in seconds."""
    figures = report.figures
    yield key_values(
        event="replay",
        **_requests(figures),
        interrupted=str(report.is_stopped).lower(),
        span_s=f"{figures.span_s:.3f}",
        requests_per_s=f"{figures.per_s(figures.num_completed):.3f}",
        answer_tokens_per_s=f"{figures.per_s(figures.answer_tokens):.1f}",
    )
    for name, found in _latencies(figures).items():
        values = {f"{statistic}_s": f"{getattr(found, statistic):.6f}" for statistic in _STATISTICS}
        yield key_values(event="latency", metric=name, count=found.count, **values)
    yield key_values(event="prefix", **{name: _plain(value) for name, value in _prefix(figures).items()})
    if report.slo is not None and figures.goodput is not None:
        bounds = {name: _plain(value) for name, value in asdict(report.slo).items()}
        kept = {name: _plain(value) for name, value in asdict(figures.goodput).items()}
        yield key_values(event="goodput", **bounds, **kept)
    for item in report.slowdowns:
        measured = {"measured": f"{item.measured:.3f}", "limit": f"{item.limit:g}", "kept": str(item.is_kept).lower()}
        yield key_values(event="slowdown", metric=item.metric, percentile=item.percent, **measured)
    for code, count in figures.errors.items():
        yield key_values(event="errors", code=code, count=count, first=brief(figures.first_error[code]))


def _plain(value: float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def table(report: ReplayReport) -> RenderableType:
    """Returns what a terminal shows. Times are in milliseconds."""
    shown = Table(title=Text(_title(report)), title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("ms")
    for column in ("count", "mean", "P50", "P90", "P99", "max"):
        shown.add_column(column, justify="right")
    for name, found in _latencies(report.figures).items():
        values = [f"{getattr(found, statistic) * 1e3:.1f}" for statistic in _STATISTICS]
        shown.add_row(_NAMES[name], str(found.count), *values)
    return Group(shown, *map(Text, _sentences(report)))


def _title(report: ReplayReport) -> str:
    figures = report.figures
    stopped = "stopped: " if report.is_stopped else ""
    took = f"{figures.num_completed} of {figures.num_planned} requests answered in {figures.span_s:.1f} s"
    tokens_per_s = figures.per_s(figures.answer_tokens)
    return f"{stopped}{took}: {figures.per_s(figures.num_completed):.2f} requests/s, {tokens_per_s:.1f} tokens/s"


def _sentences(report: ReplayReport) -> Iterator[str]:
    figures = report.figures
    for code, count in figures.errors.items():
        yield f"{count} failed with {code}: {brief(figures.first_error[code])}"
    if figures.num_stopped:
        yield f"{figures.num_stopped} were still running when it was stopped"
    if figures.num_clipped:
        yield f"{figures.num_clipped} were shortened to fit the context"
    if figures.prefix_hit_rate is not None:
        share = f"; a perfect cache would find {figures.shared_rate:.1%}" if figures.shared_tokens else ""
        yield f"prefix cache: {figures.prefix_hit_rate:.1%} of the prompt tokens were found{share}"
    if report.slo is not None and figures.goodput is not None:
        kept = figures.goodput
        rate = f"{kept.share:.1%}, {kept.per_s:.2f} a second"
        yield f"goodput: {kept.num_kept} requests kept {_bounds(report.slo)}: {rate}"
    for metric, items in groupby(report.slowdowns, key=lambda item: item.metric):
        yield f"{metric.upper()} as a multiple of that of an idle service: {', '.join(map(_multiple, items))}"


def _multiple(item: Slowdown) -> str:
    verdict = "" if item.is_kept else ", missed"
    return f"P{item.percent} {item.measured:.2f} (at most {item.limit:g}{verdict})"


def _bounds(slo: Slo) -> str:
    named = {"TTFT": slo.ttft_s, "mean TBT": slo.tbt_s}
    return " and ".join(f"{name} <= {bound * 1e3:g} ms" for name, bound in named.items() if bound is not None)
