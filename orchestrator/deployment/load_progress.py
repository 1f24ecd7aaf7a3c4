"""Shows how loading goes on, from what the controller streams: bars on a terminal, log lines elsewhere.

Every WatchResponse is given to it, and ``tick`` is called now and then between them, so that a stall shows too.
"""

import time
from collections.abc import Callable, Mapping
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
    TimeElapsedColumn,
)
from rich.text import Text

from orchestrator.event_log import EventLog, LogFormat, LogLevel, Said
from placement.planning.memory import format_bytes
from protos.codec.loading import Loading, doing, part_of_rank
from protos.heterodyne.control.v1 import control_pb2

LINE_EVERY_S = 1.0
STALL_S = 30.0
"""How long a rank may have no more weights while some are to come. They count whole tensors, once these are converted,
which for a large one takes some seconds."""

LONG_S: Mapping[Loading, float] = {
    Loading.CONNECT: 20.0,
    Loading.KV_CACHE: 20.0,
    Loading.COMPILE: 120.0,
    Loading.MEASURE: 60.0,
    Loading.WARM_UP: 60.0,
}
"""How long what has no bytes to count may take before that is worth a word."""

_READY, _FAILED = "ready", "failed"
_LOADING = (control_pb2.PHASE_STARTING, control_pb2.PHASE_LOADING)


@dataclass(slots=True, kw_only=True)
class _RankLoad:
    """Describes how far one rank of one epoch has loaded. Times are readings of the clock.

    Attributes:
        moved_s: when it last read something, or began to do something else.
        part: the part of its load that it is at.
        knows_total: whether it has said how much it has to read, with which its reading begins.
        first_s: when its first bytes had come.
        first_bytes: how many those were.
        cause: why it failed, where it did.
    """

    replica: str
    epoch: int
    rank: int
    worker: str
    moved_s: float
    doing: str = ""
    cause: str = ""
    part: Loading | None = None
    knows_total: bool = False
    loaded_bytes: int = 0
    total_bytes: int = 0
    first_s: float | None = None
    first_bytes: int = 0
    shown_s: float | None = None
    stall_shown: bool = False
    bar: TaskID | None = None

    @property
    def name(self) -> str:
        return f"{self.replica} rank {self.rank}" + (f" ({self.worker})" if self.worker else "")

    @property
    def is_reading(self) -> bool:
        return self.part is Loading.WEIGHTS and self.knows_total and self.loaded_bytes < self.total_bytes

    @property
    def long_s(self) -> float | None:
        """Returns how long it may stand as it is; None where it may for as long as it likes."""
        if self.is_reading:
            return STALL_S
        return None if self.part is None else LONG_S.get(self.part)

    def bytes_per_s(self, now_s: float) -> float | None:
        """Returns how fast bytes came since the first; None where that is not known."""
        if self.first_s is None or now_s <= self.first_s or self.loaded_bytes <= self.first_bytes:
            return None
        return (self.loaded_bytes - self.first_bytes) / (now_s - self.first_s)


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
        attention = [response.attention] if response.HasField("attention") else []
        for replica in (*attention, *response.replicas):
            for rank in replica.ranks:
                load = self._rank_load(replica, rank, now_s)
                now_doing = doing(rank)
                changed = now_doing != load.doing
                begins = rank.total_bytes > 0 and not load.knows_total
                if rank.loaded_bytes > load.loaded_bytes or changed or begins:
                    load.moved_s, load.stall_shown = now_s, False
                if rank.loaded_bytes and load.first_s is None:
                    load.first_s, load.first_bytes = now_s, rank.loaded_bytes
                load.doing, load.part, load.loaded_bytes = now_doing, part_of_rank(rank), rank.loaded_bytes
                load.cause = rank.cause if rank.phase == control_pb2.PHASE_FAILED else ""
                load.knows_total = rank.total_bytes > 0
                load.total_bytes = rank.total_bytes or rank.weight_bytes
                is_loading = rank.phase in _LOADING
                self._show(load, now_s, changed=changed, is_loading=is_loading)
        self.tick()

    def tick(self) -> None:
        """Reports each rank that stands for too long, once for each time."""
        now_s = self._clock()
        for load in self._ranks.values():
            if load.long_s is None or load.stall_shown or now_s - load.moved_s < load.long_s:
                continue
            load.stall_shown = True
            if load.is_reading:
                self._say_stalled(load, now_s - load.moved_s)
            else:
                self._say_slow(load, now_s - load.moved_s)

    def _say_stalled(self, load: _RankLoad, stood_s: float) -> None:
        of = f"{format_bytes(load.loaded_bytes)} of {format_bytes(load.total_bytes)}"
        why = "its disk is slow, or a large tensor is being converted"
        self._log.say(
            "stall",
            f"{load.name} has stood at {of} for {stood_s:.0f} s: {why}.",
            level=LogLevel.WARNING,
            replica=load.replica,
            rank=load.rank,
            loaded_bytes=load.loaded_bytes,
            total_bytes=load.total_bytes,
            no_progress_s=round(stood_s),
        )

    def _say_slow(self, load: _RankLoad, stood_s: float) -> None:
        self._log.say(
            "slow",
            f"{load.name} is still {load.doing} after {stood_s:.0f} s.",
            replica=load.replica,
            rank=load.rank,
            phase=load.doing,
            for_s=round(stood_s),
        )

    def _rank_load(self, replica: control_pb2.Replica, rank: control_pb2.Rank, now_s: float) -> _RankLoad:
        """Returns the rank's record; a new epoch starts a new one."""
        key = (replica.name, rank.rank)
        known = self._ranks.get(key)
        if known is not None and known.epoch == replica.epoch:
            return known
        load = _RankLoad(replica=replica.name, epoch=replica.epoch, rank=rank.rank, worker=rank.worker, moved_s=now_s)
        if self._bars is not None:
            old_bar = known.bar if known is not None else None
            load.bar = self._bars.add_task(load.name, total=None) if old_bar is None else old_bar
            self._bars.reset(load.bar, completed=0)
        self._ranks[key] = load
        return load

    def _show(self, load: _RankLoad, now_s: float, *, changed: bool, is_loading: bool) -> None:
        if self._bars is not None and load.bar is not None:
            self._show_bar(self._bars, load.bar, load)
        is_due = load.shown_s is None or now_s - load.shown_s >= LINE_EVERY_S
        if self._bars is None and (changed or (is_loading and load.is_reading and is_due)):
            self._say_progress(load, now_s)

    def _show_bar(self, bars: Progress, bar: TaskID, load: _RankLoad) -> None:
        """Fills the bar while bytes come and once all is done; between, it moves, as there is nothing to count."""
        bars.update(bar, description=f"{load.name}: {load.doing}", completed=load.loaded_bytes)
        counts = load.total_bytes and (load.is_reading or load.doing == _READY)
        for task in bars.tasks:
            if task.id == bar:
                task.total = load.total_bytes if counts else None  # `update` takes None for "as before"

    def _say_progress(self, load: _RankLoad, now_s: float) -> None:
        load.shown_s = now_s
        bytes_per_s = load.bytes_per_s(now_s) if load.is_reading else None
        left_bytes = load.total_bytes - load.loaded_bytes
        fields: dict[str, object] = {"replica": load.replica, "rank": load.rank, "worker": load.worker}
        fields |= {"phase": load.doing, "loaded_bytes": load.loaded_bytes, "total_bytes": load.total_bytes}
        if bytes_per_s is not None:
            fields |= {"bytes_per_s": round(bytes_per_s), "left_s": round(left_bytes / bytes_per_s, 1)}
        of = f": {format_bytes(load.loaded_bytes)} of {format_bytes(load.total_bytes)}" if load.is_reading else ""
        sentence, level = f"{load.name} is {load.doing}{of}.", LogLevel.INFO
        if load.doing == _FAILED:
            sentence, level = f"{load.name} failed: {load.cause}", LogLevel.ERROR
            fields["cause"] = load.cause
        self._log.tell(Said(event="load", sentence=sentence, fields=fields, level=level))


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
    name = TextColumn("{task.description}", markup=False)
    return Progress(name, BarColumn(), _Loaded(), TimeElapsedColumn(), console=console)
