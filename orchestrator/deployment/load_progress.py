"""Shows how loading goes on, from what the controller streams: bars on a terminal, log lines elsewhere.

Every WatchResponse is given to it, and ``tick`` is called now and then between them, so that a stall shows too.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from orchestrator.event_log import EventLog, LogFormat, LogLevel
from placement.planning.memory import format_bytes
from protos.heterodyne.control.v1 import control_pb2

STALL_S = 10.0
LINE_EVERY_S = 1.0
_LOADING = (control_pb2.PHASE_STARTING, control_pb2.PHASE_LOADING)


@dataclass(slots=True, kw_only=True)
class _RankLoad:
    """How far one rank of one epoch has loaded. Times are readings of the clock."""

    replica: str
    epoch: int
    rank: int
    started_s: float
    moved_s: float
    phase: "control_pb2.Phase.ValueType" = control_pb2.PHASE_UNSPECIFIED
    loaded_bytes: int = 0
    total_bytes: int = 0
    shown_s: float | None = None
    stall_shown: bool = False
    bar: TaskID | None = None

    @property
    def name(self) -> str:
        return f"{self.replica} rank {self.rank}"

    @property
    def is_loading(self) -> bool:
        return self.phase == control_pb2.PHASE_LOADING and self.loaded_bytes < self.total_bytes


class LoadProgress:
    """Shows the loading of a deployment on a log's console. It is a context manager whose end ends the bars."""

    def __init__(self, log: EventLog, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._ranks: dict[tuple[str, int], _RankLoad] = {}
        self._bars = _bars(log.console) if log.console.is_terminal and log.format is LogFormat.TEXT else None

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, response: control_pb2.WatchResponse) -> None:
        """Takes in the state of every rank and shows what changed."""
        now_s = self._clock()
        for replica in response.replicas:
            for rank in replica.ranks:
                load = self._rank_load(replica, rank.rank, now_s)
                phase_changed = rank.phase != load.phase
                if rank.loaded_bytes > load.loaded_bytes or phase_changed:
                    load.moved_s, load.stall_shown = now_s, False
                load.phase, load.total_bytes = rank.phase, rank.weight_bytes
                load.loaded_bytes = rank.loaded_bytes
                self._show(load, now_s, phase_changed=phase_changed)
        self.tick()

    def tick(self) -> None:
        """Reports each rank that has loaded nothing for :data:`STALL_S`, once for each stall."""
        now_s = self._clock()
        for load in self._ranks.values():
            if load.is_loading and not load.stall_shown and now_s - load.moved_s >= STALL_S:
                load.stall_shown = True
                self._log.say(
                    "stall",
                    f"{load.name} has loaded nothing for {now_s - load.moved_s:.0f} s.",
                    level=LogLevel.WARNING,
                    replica=load.replica,
                    rank=load.rank,
                    loaded_bytes=load.loaded_bytes,
                    total_bytes=load.total_bytes,
                    no_progress_s=f"{now_s - load.moved_s:.0f}",
                )

    def _rank_load(self, replica: control_pb2.Replica, rank: int, now_s: float) -> _RankLoad:
        """Returns the rank's record; a new epoch starts a new one."""
        known = self._ranks.get((replica.name, rank))
        if known is not None and known.epoch == replica.epoch:
            return known
        load = _RankLoad(replica=replica.name, epoch=replica.epoch, rank=rank, started_s=now_s, moved_s=now_s)
        if self._bars is not None:
            old_bar = known.bar if known is not None else None
            load.bar = self._bars.add_task(load.name, total=None) if old_bar is None else old_bar
            self._bars.reset(load.bar, completed=0)
        self._ranks[replica.name, rank] = load
        return load

    def _show(self, load: _RankLoad, now_s: float, *, phase_changed: bool) -> None:
        phase = control_pb2.Phase.Name(load.phase).removeprefix("PHASE_").lower()
        if self._bars is not None and load.bar is not None:
            self._bars.update(
                load.bar,
                description=f"{load.name}: {phase}",
                total=load.total_bytes or None,
                completed=load.loaded_bytes,
            )
        is_due = load.shown_s is None or now_s - load.shown_s >= LINE_EVERY_S
        if self._bars is None and (phase_changed or (load.phase in _LOADING and is_due)):
            self._progress_line(load, phase, now_s)

    def _progress_line(self, load: _RankLoad, phase: str, now_s: float) -> None:
        load.shown_s = now_s
        elapsed_s = now_s - load.started_s
        bytes_per_s = load.loaded_bytes / elapsed_s if elapsed_s > 0 else 0.0
        left_bytes = load.total_bytes - load.loaded_bytes
        self._log.say(
            "load",
            f"{load.name} is {phase}: {format_bytes(load.loaded_bytes)} of {format_bytes(load.total_bytes)}.",
            replica=load.replica,
            rank=load.rank,
            phase=phase,
            loaded_bytes=load.loaded_bytes,
            total_bytes=load.total_bytes,
            bytes_per_s=f"{bytes_per_s:.0f}" if bytes_per_s else "",
            left_s=f"{left_bytes / bytes_per_s:.1f}" if bytes_per_s and load.is_loading else "",
        )


class _Loaded(ProgressColumn):
    """A column that says how much was loaded, how fast, and how long it will still take, as far as that is known."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        words = [f"{format_bytes(int(task.completed))} of {format_bytes(int(task.total))}"]
        if task.speed and task.time_remaining:
            words += [f"{format_bytes(int(task.speed))}/s", f"{task.time_remaining:.0f} s left"]
        return Text(", ".join(words))


def _bars(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(), _Loaded(), console=console)
