"""How loading is shown, on a terminal and elsewhere."""

import io
import shlex
from typing import Any, cast

import pytest
from rich.console import Console

from orchestrator.deployment.load_progress import LoadProgress
from orchestrator.event_log import EventLog
from protos.heterodyne.control.v1 import control_pb2


def log(*, terminal: bool) -> EventLog:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    return EventLog(console)


def output(shown: EventLog) -> str:
    return cast(io.StringIO, shown.console.file).getvalue()


def pairs(line: str) -> dict[str, str]:
    """The pairs of a line without its time and level, which stand first."""
    first, second, *rest = (word.split("=", 1) for word in shlex.split(line))
    assert (first[0], second[0]) == ("time", "level")
    return dict(rest)


class Clock:
    """A clock that the test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def loading(loaded: int, *, phase: Any = control_pb2.PHASE_LOADING, **replica: Any) -> control_pb2.WatchResponse:
    rank = control_pb2.Rank(rank=0, phase=phase, loaded_bytes=loaded, weight_bytes=1000)
    settings = {"name": "replica-0", "epoch": 1} | replica
    return control_pb2.WatchResponse(replicas=[control_pb2.Replica(ranks=[rank], **settings)])


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_loading_is_logged_at_most_once_a_second(clock: Clock) -> None:
    shown = log(terminal=False)
    with LoadProgress(shown, clock=clock) as progress:
        for step in range(10):
            progress.update(loading(25 * step))
            clock.now_s += 0.25
        progress.update(loading(1000, phase=control_pb2.PHASE_READY))
    lines = [pairs(line) for line in output(shown).splitlines()]
    assert [(line["phase"], line["loaded_bytes"]) for line in lines] == [
        ("loading", "0"), ("loading", "100"), ("loading", "200"), ("ready", "1000"),
    ]  # fmt: skip
    assert lines[1] == {
        "event": "load", "replica": "replica-0", "rank": "0", "phase": "loading", "loaded_bytes": "100",
        "total_bytes": "1000", "bytes_per_s": "100", "left_s": "9.0",
    }  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_stall_is_reported_once_until_bytes_move_again(clock: Clock, terminal: bool) -> None:
    shown = log(terminal=terminal)
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(100))
        clock.now_s += 9.9
        progress.tick()
        words = "has loaded nothing for 10 s" if terminal else "event=stall replica=replica-0 rank=0 loaded_bytes=100"
        assert words not in output(shown)
        clock.now_s += 0.2
        progress.tick()
        progress.tick()
        assert output(shown).count(words) == 1
        progress.update(loading(101))
        clock.now_s += 10.0
        progress.tick()
    assert output(shown).count("nothing for 10 s" if terminal else "event=stall") == 2


def test_rank_that_is_loaded_does_not_stall(clock: Clock) -> None:
    shown = log(terminal=False)
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(1000))
        clock.now_s += 60
        progress.tick()
    assert "stall" not in output(shown)


def test_new_epoch_starts_from_nothing(clock: Clock) -> None:
    shown = log(terminal=False)
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(900))
        clock.now_s += 5
        progress.update(loading(0, epoch=2))
        clock.now_s += 5
        progress.update(loading(500, epoch=2))
    assert pairs(output(shown).splitlines()[-1])["bytes_per_s"] == "100"


def test_terminal_has_one_bar_a_rank(clock: Clock) -> None:
    shown = log(terminal=True)
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(500))
        progress.update(loading(0, name="replica-1"))
        progress.update(loading(1000, phase=control_pb2.PHASE_READY))
    text = output(shown)
    assert "replica-0 rank 0: ready" in text
    assert "replica-1 rank 0: loading" in text
    assert "event=load" not in text
