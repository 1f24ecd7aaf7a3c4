"""The one form in which benchmarks report: a JSON file, a table, a PNG where there is a curve, the headline last."""

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import psutil
from rich.console import Console
from rich.table import Table

from kernels.cpu.machine.target import chosen

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path("build/bench")
_MODEL_NAME = "model name"
_WIDTH = 140
_MOST_COLUMNS = 4  # of pictures side by side


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure.

    Attributes:
        samples: how many measurements stand behind ``value``.
        spread: least and most of them; None where there is one only.
    """

    value: float
    unit: str
    samples: int = 1
    spread: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Lines over one axis, drawn as one picture. A line is (x, y) pairs by name."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A table for the terminal."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one benchmark found.

    Attributes:
        versions: beside those that every report names.
        left_out: what was asked for and not measured, with the reason.
        settings: what it was run with, for whoever repeats it.
        target: the kind of CPU that our code was compiled for; that of this process, where it is empty.
    """

    name: str
    headline: str
    metrics: Mapping[str, Metric]
    tables: Sequence[Rows]
    curves: Sequence[Curve] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: str = ""


def median(samples: Sequence[float], unit: str) -> Metric:
    """The median of ``samples``, at least one, with the range they lie in."""
    spread = (min(samples), max(samples)) if len(samples) > 1 else None
    return Metric(value=statistics.median(samples), unit=unit, samples=len(samples), spread=spread)


def shown(metric: Metric, digits: int = 2) -> str:
    """``1.52x (1.48-1.60)``."""
    unit = metric.unit if metric.unit in ("x", "%") else f" {metric.unit}"
    range_ = f" ({metric.spread[0]:.{digits}f}-{metric.spread[1]:.{digits}f})" if metric.spread else ""
    return f"{metric.value:.{digits}f}{unit}{range_}"


def machine(load_at_start: Sequence[float]) -> dict[str, Any]:
    """What it ran on. ``load_at_start`` is ``os.getloadavg()`` from before the first measurement."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_start": list(load_at_start),
        "load_average_end": list(os.getloadavg()),
    }


def versions() -> dict[str, str]:
    """Python, torch and the commit of this repository, ``-dirty`` where files differ from it."""
    return {"python": platform.python_version(), "torch": metadata.version("torch"), "heterodyne": _commit()}


def publish(report: Report, *, load_at_start: Sequence[float], output: Path) -> None:
    """Write ``output`` (.json) and the pictures beside it, print the tables, and the headline last."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": report.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(load_at_start),
        "target": report.target or chosen().name,
        "versions": versions() | dict(report.versions),
        "settings": dict(report.settings),
        "left_out": dict(report.left_out),
        "headline": report.headline,
        "metrics": {key: _plain(metric) for key, metric in report.metrics.items()},
    }
    output.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    console = Console(width=_WIDTH, highlight=False)
    for table in report.tables:
        console.print(_table(table))
    for what, reason in report.left_out.items():
        console.print(f"left out: {what}: {reason}", markup=False)
    console.print(f"written: {output}", markup=False, soft_wrap=True)
    if report.curves:
        picture = output.with_suffix(".png")
        _draw(report.curves, picture)
        console.print(f"drawn: {picture}", markup=False, soft_wrap=True)
    console.print(report.headline, markup=False, soft_wrap=True)


def _plain(metric: Metric) -> dict[str, Any]:
    return {key: value for key, value in asdict(metric).items() if value is not None}


def _table(rows: Rows) -> Table:
    table = Table(title=rows.title, title_justify="left")
    for index, column in enumerate(rows.columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows.rows:
        table.add_row(*row)
    return table


def _draw(curves: Sequence[Curve], picture: Path) -> None:
    num_columns, num_rows = min(len(curves), _MOST_COLUMNS), math.ceil(len(curves) / _MOST_COLUMNS)
    figsize = (6 * num_columns, 4.5 * num_rows)
    figure, axes = pyplot.subplots(num_rows, num_columns, figsize=figsize, squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, curve in zip(axes.flat, curves, strict=False):
        for name, points in curve.lines.items():
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axis.set(title=curve.title, xlabel=curve.x_label, ylabel=curve.y_label, xscale="log", yscale="log")
        ticks = sorted({x for points in curve.lines.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        axis.minorticks_off()
        heights = [y for points in curve.lines.values() for _, y in points]
        if max(heights) < 10 * min(heights):  # else there may be no power of ten among them to label
            axis.yaxis.set_major_locator(ticker.MaxNLocator(6))
            axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(_MODEL_NAME))
    return next(named, platform.processor() or platform.machine())


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
