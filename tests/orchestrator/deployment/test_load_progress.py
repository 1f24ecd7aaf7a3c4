"""How loading is shown, on a terminal and elsewhere."""

import io
import shlex
from typing import Any, cast

import pytest
from rich.console import Console

from orchestrator.deployment.load_progress import LoadProgress
from orchestrator.event_log import EventLog
from protos.heterodyne.control.v1 import control_pb2
from protos.heterodyne.worker.v1 import worker_pb2

LOADING = control_pb2.PHASE_LOADING
WEIGHTS, UNKNOWN = worker_pb2.LOAD_PHASE_WEIGHTS, worker_pb2.LOAD_PHASE_UNSPECIFIED


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


def loading(
    loaded: int, *, does: Any = WEIGHTS, phase: Any = LOADING, total: int = 1000, **replica: Any
) -> control_pb2.WatchResponse:
    rank = control_pb2.Rank(
        rank=0, worker="big", phase=phase, load_phase=does, loaded_bytes=loaded, total_bytes=total, weight_bytes=1200
    )
    settings = {"name": "replica-0", "epoch": 1} | replica
    return control_pb2.WatchResponse(replicas=[control_pb2.Replica(ranks=[rank], **settings)])


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_load_that_failed_is_an_error_with_its_cause(clock: Clock) -> None:
    shown = log(terminal=False)
    failed = loading(100, phase=control_pb2.PHASE_FAILED, does=UNKNOWN)
    failed.replicas[0].ranks[0].cause = "model.path: /models/x is not the same"
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(100))
        progress.update(failed)
        progress.update(failed)
    before, line = output(shown).splitlines()
    assert " level=info " in before and "cause" not in pairs(before)
    assert " level=error " in line
    assert (pairs(line)["phase"], pairs(line)["cause"]) == ("failed", "model.path: /models/x is not the same")


def test_loading_is_logged_at_most_once_a_second_with_a_rate_that_counts_from_the_first_byte(clock: Clock) -> None:
    shown = log(terminal=False)
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(0, phase=control_pb2.PHASE_STARTING, does=UNKNOWN))
        clock.now_s += 50
        for step in range(10):
            progress.update(loading(100 + 25 * step))
            clock.now_s += 0.25
        progress.update(loading(1000, phase=control_pb2.PHASE_READY, does=UNKNOWN))
    lines = [pairs(line) for line in output(shown).splitlines()]
    assert [(line["phase"], line["loaded_bytes"]) for line in lines] == [
        ("starting", "0"), ("loading", "100"), ("loading", "200"), ("loading", "300"), ("ready", "1000"),
    ]  # fmt: skip
    assert lines[2] == {
        "event": "load", "replica": "replica-0", "rank": "0", "worker": "big", "phase": "loading",
        "loaded_bytes": "200", "total_bytes": "1000", "bytes_per_s": "100", "left_s": "8.0",
    }  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_stall_is_reported_once_until_bytes_move_again(clock: Clock, terminal: bool) -> None:
    shown = log(terminal=terminal)
    words = "has stood at 100 B of 1000 B for 30 s" if terminal else "event=stall replica=replica-0 rank=0"
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(100))
        clock.now_s += 29.9
        progress.tick()
        assert words not in output(shown)
        clock.now_s += 0.2
        progress.tick()
        progress.tick()
        assert output(shown).count(words) == 1
        progress.update(loading(101))
        clock.now_s += 30.0
        progress.tick()
    assert output(shown).count(words.replace("100 B", "101 B" if terminal else "100 B")) == (1 if terminal else 2)


def test_no_stall_is_told_before_a_rank_reads_weights(clock: Clock) -> None:
    shown = log(terminal=False)
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(0, total=0))
        clock.now_s += 600  # of the tokenizer, say
        progress.tick()
        progress.update(loading(0))
        clock.now_s += 29
        progress.tick()
        assert "event=stall" not in output(shown), "it has just begun to read"
        clock.now_s += 1
        progress.tick()
    assert "event=stall" in output(shown)


def test_what_has_no_bytes_to_come_does_not_stall(clock: Clock) -> None:
    shown = log(terminal=False)
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(1000))
        clock.now_s += 60
        progress.update(loading(900, does=worker_pb2.LOAD_PHASE_COMPILE))
        clock.now_s += 60
        progress.tick()
        assert "warning" not in output(shown) and "event=slow" not in output(shown)
        clock.now_s += 61
        progress.tick()
        progress.tick()
    assert "event=stall" not in output(shown)
    assert output(shown).count("event=slow replica=replica-0 rank=0 phase=compiling for_s=121") == 1


def test_every_phase_has_a_name_and_a_line_as_it_begins(clock: Clock) -> None:
    shown = log(terminal=False)
    phases = [phase for phase in worker_pb2.LoadPhase.values() if phase not in (UNKNOWN, worker_pb2.LOAD_PHASE_READY)]
    with LoadProgress(shown, clock=clock) as progress:
        for phase in (*phases, phases[-1]):
            progress.update(loading(1000, does=phase))
    names = [pairs(line)["phase"] for line in output(shown).splitlines()]
    assert len(names) == len(set(names)) == len(phases)
    assert {"loading", "compiling", "measuring links", "warming up"} < set(names)


def test_new_epoch_starts_from_nothing(clock: Clock) -> None:
    shown = log(terminal=False)
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(900))
        clock.now_s += 5
        progress.update(loading(100, epoch=2))
        clock.now_s += 5
        progress.update(loading(600, epoch=2))
    assert pairs(output(shown).splitlines()[-1])["bytes_per_s"] == "100"


def test_terminal_has_one_bar_a_rank_which_names_what_it_does(clock: Clock) -> None:
    shown = log(terminal=True)
    with LoadProgress(shown, clock=clock) as progress:
        progress.update(loading(500))
        progress.update(loading(900, name="replica-1"))
        progress.update(loading(900, name="replica-1", does=worker_pb2.LOAD_PHASE_COMPILE))
        progress.update(loading(1000, phase=control_pb2.PHASE_READY, does=UNKNOWN))
    text = output(shown)
    assert "replica-0 rank 0 (big): ready" in text
    shown_last = text[text.rindex("replica-1 rank 0 (big): compiling") :]
    assert " B of" not in shown_last.splitlines()[0], "there is nothing to count"
    assert "event=load" not in text
