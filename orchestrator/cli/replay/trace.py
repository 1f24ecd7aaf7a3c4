"""Reads recorded traces of requests: when each came, how long its prompt and its answer were, never what they said.

Two formats are known, and told apart by the first line:

- CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as the Azure LLM inference traces have.
- JSON lines with ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, as Mooncake's traces have.
  Each hash id stands for a block of 512 tokens of the prompt; equal ids stand for equal tokens.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.errors import InvalidTrace

BLOCK_TOKENS = 512
"""Tokens of a prompt that one hash id of a Mooncake trace stands for."""

_TIME, _PROMPT, _ANSWER = "TIMESTAMP", "ContextTokens", "GeneratedTokens"
_CSV_FIX = f"Write the columns {_TIME},{_PROMPT},{_ANSWER}, as 2023-11-16 18:15:46.68,374,44."
_JSON_FIX = 'Write {"timestamp": 529, "input_length": 28, "output_length": 445, "hash_ids": [7]}, one object a line.'
# Longer than any context is; sums of such lengths stay exact.
_MOST_TOKENS = 2**31 - 1
_MOST_ID = 2**63 - 1
_MOST_MS = 2.0**53


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """A recorded request.

    Attributes:
        at_s: when it came, in seconds after the first of the trace.
        prompt_tokens: the length of its prompt.
        answer_tokens: the length of its answer.
        blocks: the hash id of each block of ``BLOCK_TOKENS`` of the prompt; None where the trace has none.
    """

    at_s: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] | None = None


def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """Reads a trace, in the order of time, at least one request.

    Raises:
        InvalidTrace: the file cannot be read, is empty, or has a line that is not as its format says.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        problem = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise InvalidTrace(field=str(path), problem=problem, fix="Name a file that you may read.") from None
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise InvalidTrace(field=str(path), problem=problem, fix="Name a CSV or JSON lines file.") from None
    return parse_trace(text, name=str(path))


def parse_trace(text: str, *, name: str) -> tuple[TraceRequest, ...]:
    """Returns the requests of a trace in the order of time. ``name`` is what errors call the file.

    Raises:
        InvalidTrace: it holds no request, or a line that is not as its format says.
    """
    lines = text.splitlines()
    is_json = text.lstrip().startswith("{")
    rows = sorted(_json_rows(lines, name) if is_json else _csv_rows(lines, name), key=lambda row: row.at_s)
    if not rows:
        raise InvalidTrace(field=name, problem="holds no request", fix=_CSV_FIX)
    first_s = rows[0].at_s
    return tuple(
        TraceRequest(
            at_s=row.at_s - first_s,
            prompt_tokens=row.prompt_tokens,
            answer_tokens=row.answer_tokens,
            blocks=row.blocks,
        )
        for row in rows
    )


def _csv_rows(lines: Sequence[str], name: str) -> Iterator[TraceRequest]:
    """Yields the requests of a CSV file in its order, with the time of the epoch."""
    reader = csv.reader(lines)
    header = next(_filled(reader, name), [])
    columns = [column.strip() for column in header]
    missing = [column for column in (_TIME, _PROMPT, _ANSWER) if column not in columns]
    if missing:
        raise InvalidTrace(
            field=f"{name}, line 1", value=",".join(header), problem=f"has no column {missing[0]}", fix=_CSV_FIX
        )
    for row in _filled(reader, name):
        where = f"{name}, line {reader.line_num}"
        if len(row) != len(columns):
            problem = f"has {len(row)} values for {len(columns)} columns"
            raise InvalidTrace(field=where, value=",".join(row), problem=problem, fix=_CSV_FIX)
        values = dict(zip(columns, row, strict=True))
        yield TraceRequest(
            at_s=_time_s(values[_TIME], f"{where}, {_TIME}"),
            prompt_tokens=_count(_whole(values[_PROMPT]), f"{where}, {_PROMPT}", _CSV_FIX),
            answer_tokens=_count(_whole(values[_ANSWER]), f"{where}, {_ANSWER}", _CSV_FIX),
        )


def _filled(reader: Iterable[list[str]], name: str) -> Iterator[list[str]]:
    """Yields the rows of a CSV file that are not blank."""
    try:
        yield from (row for row in reader if any(value.strip() for value in row))
    except csv.Error as error:
        raise InvalidTrace(field=name, problem=f"is not CSV: {error}", fix=_CSV_FIX) from None


def _time_s(text: str, field: str) -> float:
    """Returns the seconds since 1970 of a date and time; UTC where it names no zone."""
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InvalidTrace(
            field=field, value=text, problem="is no date and time", fix="Write it as 2023-11-16 18:15:46.68."
        ) from None
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()


def _whole(text: str) -> object:
    """Returns the whole number that ``text`` writes, or else the text."""
    return int(text) if text.strip().isdecimal() and len(text) < 20 else text


def _json_rows(lines: Sequence[str], name: str) -> Iterator[TraceRequest]:
    """Yields the requests of JSON lines in their order, with the trace's own time."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _json_row(line, f"{name}, line {number}")


def _json_row(line: str, where: str) -> TraceRequest:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise InvalidTrace(field=where, value=line, problem="is no JSON object", fix=_JSON_FIX)
    prompt_tokens = _count(row.get("input_length"), f"{where}, input_length", _JSON_FIX)
    return TraceRequest(
        at_s=_milliseconds(row.get("timestamp"), f"{where}, timestamp") / 1e3,
        prompt_tokens=prompt_tokens,
        answer_tokens=_count(row.get("output_length"), f"{where}, output_length", _JSON_FIX),
        blocks=_blocks(row.get("hash_ids"), prompt_tokens, f"{where}, hash_ids"),
    )


def _milliseconds(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST_MS:
        raise InvalidTrace(field=field, value=value, problem="is no number of milliseconds", fix=_JSON_FIX)
    return float(value)


def _count(value: object, field: str, fix: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TOKENS:
        raise InvalidTrace(field=field, value=value, problem="is no number of tokens", fix=fix)
    return value


def _blocks(value: object, prompt_tokens: int, field: str) -> tuple[int, ...] | None:
    """Returns the hash ids of a prompt, one for each block that it begins."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(map(_is_id, value)):
        raise InvalidTrace(field=field, value=value, problem="is no list of whole numbers from 0", fix=_JSON_FIX)
    num_blocks = -(-prompt_tokens // BLOCK_TOKENS)
    if len(value) != num_blocks:
        problem = f"names {len(value)} blocks of a prompt of {num_blocks}"
        fix = f"Name one for each {BLOCK_TOKENS} tokens that the prompt begins, or leave hash_ids out."
        raise InvalidTrace(field=field, value=value, problem=problem, fix=fix)
    return tuple(value)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_ID
