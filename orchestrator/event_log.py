"""Prints what happens, a line for each event: a sentence on a terminal, ``key=value`` pairs or JSON for programs.

An event has a name, a sentence and fields, which stand side by side where it is said. Lines of child processes are
read as :class:`LogRecord` and printed in the same format; a library's own words go under the name of who said them.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from rich.console import Console

from orchestrator.key_values import key_values, printable
from orchestrator.output import dropped_words
from protos.codec.log_record import LEVELS, LogRecord, record_of

# What is said again and again is printed again once it was not said for as long as this.
_REPETITION_S = 5.0
SERVE = "serve"
"""The source of what the command line itself says, which text leaves out."""


class LogFormat(StrEnum):
    """How lines are written."""

    AUTO = "auto"
    """Lines are text on a terminal, and logfmt elsewhere."""
    TEXT = "text"
    LOGFMT = "logfmt"
    JSON = "json"


class LogLevel(StrEnum):
    """The least important events that are printed."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An event that is yet to be printed: its name, its sentence, its fields."""

    event: str
    sentence: str
    fields: Mapping[str, object] = field(default_factory=dict)
    level: LogLevel = LogLevel.INFO

    def pairs(self) -> str:
        """Returns ``event=… key=value …``."""
        return key_values(event=self.event, **self.fields)


def text_line(record: LogRecord) -> str:
    """Writes a record for a person: local time, who says it unless it is ``serve``, how bad it is, the sentence."""
    clock = datetime.fromtimestamp(record.time_s).strftime("%H:%M:%S")
    source = "" if record.source == SERVE else f"{record.source}: "
    level = f"{record.level.capitalize()}: " if record.level in ("warning", "error") else ""
    traceback = record.fields.get("traceback")
    lines = [f"{clock} {source}{level}{printable(record.message)}"]
    lines += [f"    {printable(line)}" for line in str(traceback).splitlines()] if traceback else []
    return "\n".join(lines)


def logfmt_line(record: LogRecord) -> str:
    """Writes a record as ``key=value`` pairs. The sentence is left out where the event's name and fields say it all."""
    fields = {name: value for name, value in record.fields.items() if name not in ("time", "level", "event")}
    who = {} if record.source == SERVE else {"source": record.source}
    what = {"event": record.event} if record.event else {"message": record.message}
    return key_values(time=record.utc, level=record.level, **what, **{**who, **fields})


_WRITE: Mapping[LogFormat, Callable[[LogRecord], str]] = {
    LogFormat.TEXT: text_line,
    LogFormat.LOGFMT: logfmt_line,
    LogFormat.JSON: LogRecord.line,
}


class EventLog:
    """Prints the events of this process and of its children, all of them to one stream, in their order.

    Threads may share it. Where nobody reads what it prints any more, it prints nothing: no service ends for that.

    Attributes:
        console: where lines are printed, and where to draw what is no line, such as bars.
        format: how lines are written; never AUTO.
        level: the least important events that are printed.
    """

    def __init__(
        self,
        console: Console,
        *,
        format: LogFormat = LogFormat.AUTO,
        level: LogLevel = LogLevel.INFO,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.console = console
        if format is LogFormat.AUTO:
            format = LogFormat.TEXT if console.is_terminal else LogFormat.LOGFMT
        self.format = format
        self.level = level
        self._clock = clock
        self._lock = threading.RLock()  # a finalizer may log at any time
        # When each of the latest warnings and errors was printed.
        self._printed: dict[tuple[str, str], float] = {}

    def say(self, event: str, sentence: str, /, *, level: LogLevel = LogLevel.INFO, **fields: object) -> None:
        """Prints an event of this process."""
        self.tell(Said(event=event, sentence=sentence, fields=fields, level=level))

    def tell(self, said: Said) -> None:
        """Prints an event of this process."""
        self.print(self._record(said))

    def _record(self, said: Said) -> LogRecord:
        fields = {name: value for name, value in said.fields.items() if str(value)}
        return LogRecord(
            time_s=self._clock(),
            source=SERVE,
            message=said.sentence,
            event=said.event,
            level=said.level.value,
            fields=fields,
        )

    def dropped_line(self, num_lines: int) -> str:
        """Returns the line, with its end, that stands where lines were dropped, as nothing read them."""
        words, fields = dropped_words(num_lines), {"lines": num_lines}
        said = Said(event="output_dropped", sentence=words, fields=fields, level=LogLevel.WARNING)
        return f"{self.line(said)}\n"

    def line(self, said: Said) -> str:
        """Returns how an event of this process is written."""
        return _WRITE[self.format](self._record(said))

    def pass_on(self, line: str, source: str) -> None:
        """Prints a line of another process, which is a record of ours or a library's words."""
        record = LogRecord.read(line)
        if record is None and line.strip():
            record = LogRecord(time_s=self._clock(), source=source, message=line)
        if record is not None:
            self.print(record)

    def print(self, record: LogRecord) -> None:
        """Prints a record, unless it is less important than what is asked for."""
        if LEVELS.index(record.level) < LEVELS.index(self.level) or self._is_repetition(record):
            return
        line = _WRITE[self.format](record)
        # A stream that is closed, or that nobody reads any more; for the latter a console would end the program.
        with self._lock, contextlib.suppress(OSError, ValueError, SystemExit):
            if self.console.is_terminal:  # where a line goes above the bars
                self.console.print(line, markup=False, highlight=False, soft_wrap=True, emoji=False)
            else:
                print(line, file=self.console.file, flush=True)

    def _is_repetition(self, record: LogRecord) -> bool:
        """Returns whether another process said the same just now: what ends many requests is said once."""
        if record.source == SERVE or record.level not in ("warning", "error"):
            return False
        with self._lock:
            self._printed = {key: at for key, at in self._printed.items() if abs(record.time_s - at) < _REPETITION_S}
            key = (record.source, record.message)
            is_repetition = key in self._printed
            self._printed[key] = record.time_s
        return is_repetition


class LogHandler(logging.Handler):
    """Hands what Python's ``logging`` is told in this process to an :class:`EventLog`."""

    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Prints it. What cannot be printed is no error of whoever logs it."""
        try:
            self._log.print(record_of(record, SERVE))
        except Exception:
            self.handleError(record)
