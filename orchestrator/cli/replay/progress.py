"""Shows how far a replay is: a bar on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from orchestrator.cli.replay.sending import Progress
from orchestrator.key_values import key_values

_LINE_EVERY_S = 5.0

Show = Callable[[Progress], None]
"""Shows how far a replay is; it is called several times a second."""


@contextmanager
def shown_progress(console: Console, now_s: Callable[[], float] = time.monotonic) -> Iterator[Show]:
    """Yields what shows the progress on ``console`` for the length of the block."""
    if not console.is_terminal:
        yield _lines(console, now_s)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(progress: Progress) -> None:
            counts = f"{progress.num_running} running, {progress.num_failed} failed"
            num_ended = progress.num_completed + progress.num_failed
            bar.update(task, total=progress.num_planned, completed=num_ended, description=counts)

        yield show


def _lines(console: Console, now_s: Callable[[], float]) -> Show:
    """Returns what prints a line where the last one is some seconds ago."""
    said_s = now_s()

    def show(progress: Progress) -> None:
        nonlocal said_s
        if (at_s := now_s()) - said_s >= _LINE_EVERY_S:
            said_s = at_s
            console.print(progress_line(progress), markup=False, highlight=False, soft_wrap=True)

    return show


def progress_line(progress: Progress) -> str:
    """Returns one line of ``key=value`` pairs."""
    return key_values(
        event="replaying",
        planned=progress.num_planned,
        sent=progress.num_sent,
        running=progress.num_running,
        completed=progress.num_completed,
        failed=progress.num_failed,
    )
