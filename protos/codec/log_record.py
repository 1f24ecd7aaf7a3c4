"""Owns a line of a log as a program reads it: one JSON object a line, in every process of a deployment alike.

A child process writes such lines to standard error; its parent reads them again and prints them in the format that
the user chose. So an event has a name, a sentence and fields wherever it happens. Logging goes through Python's own
``logging``: ``logger.warning("The link was lost.", extra=said("link_lost", rank=1))``.
"""

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

LAST_WORDS = "last_words"
"""The event by which a child process says why it ends. Its parent knows who waits to be told, and prints it no more."""

LEVELS = ("debug", "info", "warning", "error")
"""The names of levels, from the least important to the most."""

_PACKAGES = ("orchestrator", "workers", "placement", "protos")
_EVENT, _FIELDS = "heterodyne_event", "heterodyne_fields"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRecord:
    """Something that happened.

    Attributes:
        time_s: seconds since 1970.
        source: the process that says it, such as ``serve`` or ``worker big``.
        event: its name; empty where a library logs, which names no events.
        message: a sentence for people.
        fields: what programs want to know of it. Numbers are numbers.
    """

    time_s: float
    source: str
    message: str
    event: str = ""
    level: str = "info"
    fields: Mapping[str, object] = field(default_factory=dict)

    @property
    def utc(self) -> str:
        """Returns the time as RFC 3339 has it, in milliseconds."""
        return datetime.fromtimestamp(self.time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def line(self) -> str:
        """Returns the JSON line, without its end."""
        named = {"time": self.utc, "level": self.level, "source": self.source}
        if self.event:
            named["event"] = self.event
        return json.dumps(named | {"message": self.message, "fields": dict(self.fields)}, default=str)

    @classmethod
    def read(cls, line: str) -> "LogRecord | None":
        """Returns what a line says; None where it is no such line."""
        if not line.startswith('{"time": '):
            return None
        try:
            said = json.loads(line)
            level = str(said["level"])
            return cls(
                time_s=datetime.fromisoformat(said["time"]).timestamp(),
                source=str(said["source"]),
                message=str(said["message"]),
                event=str(said.get("event", "")),
                level=level if level in LEVELS else "info",
                fields=dict(said["fields"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            return None


def said(event: str, /, **fields: object) -> dict[str, object]:
    """Returns the ``extra`` by which a call of ``logging`` names its event and gives its fields."""
    return {_EVENT: event, _FIELDS: fields}


def record_of(record: logging.LogRecord, source: str) -> LogRecord:
    """Returns what Python's ``logging`` was told, as ours has it. A traceback becomes a field."""
    fields = dict(getattr(record, _FIELDS, {}))
    if record.exc_info and record.exc_info[1] is not None:
        fields["traceback"] = "".join(traceback.format_exception(record.exc_info[1])).rstrip()
    return LogRecord(
        time_s=record.created,
        source=source,
        message=record.getMessage(),
        event=getattr(record, _EVENT, ""),
        level=_level(record.levelno),
        fields=fields,
    )


def _level(number: int) -> str:
    """Returns the name of ours that a level of Python's comes nearest to from below: a library may have its own."""
    for name, least in (("error", logging.ERROR), ("warning", logging.WARNING), ("info", logging.INFO)):
        if number >= least:
            return name
    return "debug"


def last_words(cause: str, *, source: str, as_record: bool) -> None:
    """Prints why this process ends, as the last line of standard error: a record for its parent, or plain words."""
    record = LogRecord(time_s=time.time(), source=source, message=cause, event=LAST_WORDS, level="error")
    print(record.line() if as_record else cause, file=sys.stderr, flush=True)


class _JsonFormatter(logging.Formatter):
    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        return record_of(record, self._source).line()


def log_to_parent(source: str, *, level: str = "info") -> None:
    """Makes this process log JSON lines to standard error, whatever logged there before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(source))
    log_to(handler, level=level)


def log_to(handler: logging.Handler, *, level: str = "info") -> None:
    """Makes this process log to ``handler`` alone. Libraries never log below ``info``, whatever is asked for."""
    logging.basicConfig(level=max(logging.INFO, logging.getLevelName(level.upper())), handlers=[handler], force=True)
    for package in _PACKAGES:
        logging.getLogger(package).setLevel(level.upper())
