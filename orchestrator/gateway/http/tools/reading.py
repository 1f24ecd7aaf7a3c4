"""Reads calls of tools while they are written, by what a family of models does. Pure.

What is certain is taken, and the rest is left for when there is more; so the same is found however a text is cut. A
call is told once it is complete. What looks like one and is none is told as text.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import NoReturn

MAX_NAME = 256
_SHORT = 512  # what is held back and longer than that is within a call
_CLOSING = re.compile(r"[}\]>]")
# A text, whole or as far as it is there, or a bracket.
_LEXEME = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("|\\?\Z)|[{}\[\]]', re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_.\-]+")


class Place(Enum):
    """Where a reader is."""

    START = auto()  # nothing but blanks so far
    TEXT = auto()
    CALLS = auto()  # after a call


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made.

    Attributes:
        arguments: a JSON object, as JSON text.
    """

    name: str
    arguments: str


Item = str | ToolCall


@dataclass(frozen=True, slots=True)
class Read:
    """What a reader found.

    Attributes:
        items: in their order.
        rest: the end of the text, of which nothing is certain yet.
        place: where the rest begins.
    """

    items: tuple[Item, ...]
    rest: str
    place: Place


@dataclass(frozen=True, slots=True)
class Begin:
    """Where in a text a call begins, or may begin once there is more of it; its end where there is no sign of one."""

    index: int
    is_certain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the models of a family write calls.

    Attributes:
        markers: the special tokens of that form, which texts leave out otherwise.
        begin: finds the first call in a text that begins at a place.
        take: takes what begins a text: returns calls, or the text that is none, and where it stops; None where that
            must wait. The last argument says that no more will come.
        id_characters: how long the ids of calls are.
    """

    name: str
    markers: tuple[str, ...]
    begin: Callable[[Place, str], Begin]
    take: Callable[[str, bool], "tuple[tuple[Item, ...], int] | None"]
    id_characters: int = 24


def read(family: Family, place: Place, text: str, is_end: bool) -> Read:
    """Reads a text from a place, as far as it is certain. Where no more will come nothing is left."""
    items: list[Item] = []
    while text:
        if place is Place.CALLS:
            text = text.lstrip()  # blanks between calls are none of the answer's
        begin = family.begin(place, text)
        if not begin.is_certain:
            stop = len(text) if is_end else begin.index
            items += as_text(text[:stop])
            return Read(tuple(items), text[stop:], Place.TEXT if text[:stop].strip() else place)
        kept = len(text[: begin.index].rstrip())
        items += as_text(text[:kept])
        place = Place.TEXT if kept else place
        taken = family.take(text[begin.index :], is_end)
        if taken is None:
            return Read(tuple(items), text[kept:], place)
        found, stop = taken
        if isinstance(found[0], str):
            items += as_text(text[kept : begin.index])
        items += found
        place = Place.TEXT if isinstance(found[0], str) else Place.CALLS
        text = text[begin.index + stop :]
    return Read(tuple(items), "", place)


class ToolStream:
    """Reads an answer piece by piece."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._rest = ""
        self._place = Place.START

    def push(self, text: str) -> tuple[Item, ...]:
        """Takes the next piece; returns what is certain now."""
        is_within_call = len(self._rest) > _SHORT
        self._rest += text
        if not text or (is_within_call and _CLOSING.search(text) is None):
            return ()  # so that a long call is not read again for every piece of it
        return self._take(is_end=False)

    def finish(self) -> tuple[Item, ...]:
        """Returns what was held back."""
        return self._take(is_end=True)

    def _take(self, *, is_end: bool) -> tuple[Item, ...]:
        found = read(self._family, self._place, self._rest, is_end)
        self._rest, self._place = found.rest, found.place
        return found.items


def find_marker(text: str, marker: str) -> Begin:
    """Finds ``marker``, or else the beginning of it that ends the text, or the blanks there that may come before it."""
    begin = text.find(marker)
    if begin >= 0:
        return Begin(begin, True)
    end = len(text)
    for count in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:count]):
            end = len(text) - count
            break
    return Begin(len(text[:end].rstrip()), False)


def end_of_value(text: str, start: int) -> int | None:
    """Returns where the JSON object or array that begins at ``start`` ends, by its brackets; None where it goes on."""
    depth = 0
    for match in _LEXEME.finditer(text, start):
        lexeme = match[0]
        if lexeme[0] == '"':
            if match[1] != '"':
                return None
        else:
            depth += 1 if lexeme in "{[" else -1
            if depth <= 0:
                return match.end()
    return None


def json_of(text: str) -> object:
    """Returns the value of a JSON text; None where it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def call_of(value: object) -> ToolCall | None:
    """Returns the call that an object with a name and arguments, or parameters, stands for; None where it is none."""
    if not isinstance(value, dict) or not is_name(value.get("name")):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write them as a text within the text
        arguments = json_of(arguments)
    return ToolCall(value["name"], arguments_text(arguments)) if isinstance(arguments, dict) else None


def arguments_text(arguments: object) -> str:
    """Returns arguments as JSON text."""
    return json.dumps(arguments, ensure_ascii=False)


def is_name(value: object) -> bool:
    """Says whether a function may be called so."""
    return isinstance(value, str) and len(value) <= MAX_NAME and _NAME.fullmatch(value) is not None


def as_text(*items: str) -> tuple[Item, ...]:
    """Returns the texts that are not empty."""
    return tuple(item for item in items if item)
