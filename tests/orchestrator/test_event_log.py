"""What is said looks the same whoever says it, in the format that was asked for."""

import io
import json
import logging
import shlex
import sys
from typing import cast
from unittest import mock

import pytest
from rich.console import Console

from orchestrator.event_log import EventLog, LogFormat, LogHandler, LogLevel, text_line
from protos.codec.log_record import LogRecord, record_of, said
from tests.support.deploying.lost_stderr import Loss, lost_stderr

NOW_S = 1_796_040_183.1234


def log(format: LogFormat = LogFormat.AUTO, *, terminal: bool = False, level: LogLevel = LogLevel.INFO) -> EventLog:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=40, color_system=None)
    return EventLog(console, format=format, level=level, clock=lambda: NOW_S)


def output(shown: EventLog) -> str:
    return cast(io.StringIO, shown.console.file).getvalue()


def test_a_terminal_gets_a_sentence_and_a_file_gets_pairs() -> None:
    for terminal, expected in (
        (True, "Ready: demo at 127.0.0.1:50051 [gRPC].\n"),
        (False, "time=2026-11-30T12:03:03.123Z level=info event=serving model=demo context_tokens=2048\n"),
    ):
        shown = log(terminal=terminal)
        shown.say("serving", "Ready: demo at 127.0.0.1:50051 [gRPC].", model="demo", cause="", context_tokens=2048)
        assert output(shown).endswith(expected) and output(shown).count("\n") == 1


def test_json_is_one_object_a_line_with_numbers_as_numbers() -> None:
    shown = log(LogFormat.JSON, terminal=True)
    shown.say("serving", 'Ready: "demo".', model="demo", context_tokens=2048)
    assert json.loads(output(shown)) == {
        "time": "2026-11-30T12:03:03.123Z",
        "level": "info",
        "source": "serve",
        "event": "serving",
        "message": 'Ready: "demo".',
        "fields": {"model": "demo", "context_tokens": 2048},
    }


def test_a_record_that_was_read_again_is_the_same() -> None:
    record = LogRecord(
        time_s=NOW_S, source="worker big", message="a\nb é", event="e", level="warning", fields={"n": 1, "t": "x y"}
    )
    read = LogRecord.read(record.line())
    assert read is not None and read.time_s == pytest.approx(NOW_S, abs=0.001)
    assert (read.source, read.message, read.event, read.level) == ("worker big", "a\nb é", "e", "warning")
    assert read.fields == {"n": 1, "t": "x y"}


@pytest.mark.parametrize(
    "line", ["", "words", "{", '{"time": 1}', '{"time": "soon"}', "[1]", '{"time": "2026-11-30T12:03:04Z"}']
)
def test_what_is_no_record_is_not_read_as_one(line: str) -> None:
    assert LogRecord.read(line) is None


def test_a_childs_words_go_under_its_name() -> None:
    shown = log()
    shown.pass_on(LogRecord(time_s=NOW_S, source="gateway", message="A replica is lost.", event="lost").line(), "x")
    shown.pass_on("NCCL INFO ring 0", "worker big")
    shown.pass_on("  ", "worker big")
    first, second = output(shown).splitlines()
    assert first.endswith("event=lost source=gateway")
    assert second.endswith('message="NCCL INFO ring 0" source="worker big"')


@pytest.mark.parametrize("terminal", [False, True])
def test_all_lines_go_to_one_stream_in_their_order(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    shown = EventLog(Console(force_terminal=terminal, color_system=None), format=LogFormat.LOGFMT)
    shown.say("serving", "Ready.")
    shown.pass_on("Loading libraries", "gateway")
    shown.say("drained", "Stopped.")
    printed = capsys.readouterr()
    said_what = [line.split()[2] for line in printed.out.splitlines()]
    assert said_what == ["event=serving", 'message="Loading', "event=drained"]
    assert printed.err == ""


def test_text_names_who_speaks_and_what_is_wrong() -> None:
    record = LogRecord(time_s=NOW_S, source="gateway", message="A replica\x1b[2J is lost.", level="warning")
    assert text_line(record)[8:] == r" gateway: Warning: A replica\x1b[2J is lost."


def test_what_matters_less_than_asked_for_is_not_printed() -> None:
    shown = log(level=LogLevel.WARNING)
    shown.say("connect", "Joining.")
    shown.say("hosts", "No room.", level=LogLevel.WARNING)
    assert output(shown).count("event=") == 1


def test_logging_names_the_event_and_keeps_a_traceback_of_what_nobody_expected() -> None:
    shown = log(LogFormat.TEXT)
    logger = logging.Logger("orchestrator.test")
    logger.addHandler(LogHandler(shown))
    logger.warning("Telemetry was not sent.", extra=said("telemetry_not_sent", timeout_s=3.0))
    try:
        raise KeyError("a")
    except KeyError:
        logger.exception("The request failed.", extra=said("request_failed"))
    lines = output(shown).splitlines()
    assert lines[0].endswith("Warning: Telemetry was not sent.")
    assert lines[1].endswith("Error: The request failed.") and lines[-1] == "    KeyError: 'a'"


def test_levels_of_a_library_are_named_by_their_number() -> None:
    shown = log()
    logger = logging.Logger("library")
    logger.addHandler(LogHandler(shown))
    for level in (5, 25, 35, 60):
        logger.log(level, "It was said.")
    assert [line.split()[1] for line in output(shown).splitlines()] == ["level=info", "level=warning", "level=error"]


def test_words_that_cannot_be_printed_raise_nothing_where_they_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("library")
    logger.addHandler(LogHandler(log()))
    logger.warning("%d", "x")
    assert "Logging error" in capsys.readouterr().err


def test_pairs_of_a_traceback_stay_on_one_line() -> None:
    try:
        raise KeyError("a")
    except KeyError as error:
        info = (KeyError, error, error.__traceback__)
    record = logging.LogRecord("x", logging.CRITICAL, "x.py", 1, "It failed.", None, info)
    shown = log()
    shown.print(record_of(record, "serve"))
    (line,) = output(shown).splitlines()
    assert "level=error" in line and any(word.startswith("traceback=Traceback") for word in shlex.split(line))


@pytest.mark.parametrize("loss", [Loss.CLOSED, Loss.BROKEN])
def test_a_stream_that_is_lost_ends_nothing(loss: Loss) -> None:
    with lost_stderr(loss):
        EventLog(Console(file=sys.stderr)).pass_on("hello", "gateway")


def test_a_console_that_nobody_reads_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own answer to that is to point the process's standard output elsewhere, which the test's has to keep.
    monkeypatch.setattr(Console, "on_broken_pipe", mock.Mock(side_effect=SystemExit(1)))
    with lost_stderr(Loss.BROKEN):
        EventLog(Console(file=sys.stderr)).say("drained", "Stopped.")


def test_a_warning_that_every_request_brings_is_printed_once() -> None:
    shown = log()
    for time_s in (NOW_S, NOW_S + 1, NOW_S + 2, NOW_S + 30):
        shown.print(LogRecord(time_s=time_s, source="gateway", message="replica-0 failed.", level="error"))
        shown.print(LogRecord(time_s=time_s, source="gateway", message="Busy.", level="info"))
    printed = output(shown)
    assert (printed.count("failed"), printed.count("Busy")) == (2, 4)
