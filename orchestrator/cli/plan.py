"""Owns the command ``plan``, which shows in words and as a picture what ``serve`` would do, without doing it."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from orchestrator.cli.output_file import write_output
from orchestrator.cli.plan_picture import plan_svg
from orchestrator.config.document import load_config
from orchestrator.deployment.auto_split import split_words
from orchestrator.deployment.plan_lines import place_of, plan_events, warning_events
from orchestrator.deployment.preflight import preflight


def show_plan(path: Path, *, overrides: Sequence[str], picture: Path | None, in_words: bool = False) -> Iterator[str]:
    """Yields the lines of the plan for a cluster file, and writes ``picture`` where one is asked for. Starts nothing.

    Args:
        in_words: whether the lines are sentences; else they are ``key=value`` pairs.

    Raises:
        HeterodyneError: a mistake in the input.
    """
    checked = preflight(load_config(path, overrides=overrides), listens=False)
    events = [*warning_events(checked), *plan_events(checked)]
    if checked.split_by is not None:
        events.append(split_words(checked, when_served="by measured speed"))
    for said in events:
        yield said.sentence if in_words else said.pairs()
    if picture is None:
        return
    write_output(picture, plan_svg(checked.plan, partial(place_of, checked)), field="--svg")
    yield f"drawn in {picture}"
