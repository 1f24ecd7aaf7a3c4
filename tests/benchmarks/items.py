"""What benchmarks of several items have in common: which are measured, and how they are reported."""

import argparse
import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.parallel.parallel_figures import Findings
from tests.benchmarks.report import Report, publish, shown


def among(known: Collection[str]) -> Callable[[str], list[str]]:
    """Returns what reads names that are separated by commas, each of which must be known."""

    def read(text: str) -> list[str]:
        items = text.split(",")
        for item in items:
            if item not in known:
                raise argparse.ArgumentTypeError(f"{item!r} is not one of {', '.join(known)}")
        return items

    return read


def report_items(
    name: str,
    found: Findings,
    *,
    headline: Sequence[str],
    sizes: Any,
    items: Sequence[str],
    load_at_start: tuple[float, float, float],
    output: Path,
) -> None:
    """Reports what was found.

    Args:
        headline: the keys that stand in the last line.
        sizes: the dataclass of what was measured, which becomes the settings.
    """
    figures = ", ".join(f"{key} {shown(found.metrics[key])}" for key in headline if key in found.metrics)
    settings = {key: str(value) for key, value in dataclasses.asdict(sizes).items()} | dict(found.settings)
    report = Report(
        name=name,
        headline=f"{name}: {figures or f'{len(found.metrics)} figures'}",
        metrics=found.metrics,
        tables=found.tables,
        curves=found.curves,
        left_out=found.left_out,
        settings=settings | {"items": ",".join(items)},
    )
    publish(report, load_at_start=load_at_start, output=output)
