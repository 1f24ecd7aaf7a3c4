"""Reads calls as Mistral models write them: a list of objects behind ``[TOOL_CALLS]``, or in newer ones, for each call,
``[TOOL_CALLS]name[ARGS]{…}``. Pure.
"""

import re

from orchestrator.gateway.http.tools.reading import (
    MAX_NAME,
    Begin,
    Family,
    Item,
    Place,
    ToolCall,
    arguments_text,
    call_of,
    end_of_value,
    find_marker,
    is_name,
    json_of,
)

MARKER = "[TOOL_CALLS]"
_ID, _ARGS = "[CALL_ID]", "[ARGS]"
# What may stand between the marker and the arguments of a call.
_HEAD = re.compile(r"\s*([^\s\[\]{]+)\s*(?:\[CALL_ID\][A-Za-z0-9]+)?(?:\[ARGS\])?\s*")
_LONGEST_HEAD = 2 * MAX_NAME


def begin_mistral(place: Place, text: str) -> Begin:
    """Finds the first call, or list of calls."""
    return find_marker(text, MARKER)


def take_mistral(text: str, is_end: bool) -> tuple[tuple[Item, ...], int] | None:
    """Takes the calls that begin the text."""
    start = len(text) - len(text[len(MARKER) :].lstrip())
    is_list = text[start : start + 1] == "["
    if not is_list:
        start = text.find("{", len(MARKER), len(MARKER) + _LONGEST_HEAD)
        if start < 0 and len(text) >= len(MARKER) + _LONGEST_HEAD:
            return (MARKER,), len(MARKER)
    stop = end_of_value(text, start) if 0 <= start < len(text) else None
    if stop is None:
        return ((text,), len(text)) if is_end else None
    value = json_of(text[start:stop])
    calls = _listed(value) if is_list else _named(text[len(MARKER) : start], value)
    return calls or (text[:stop],), stop


def _listed(value: object) -> tuple[ToolCall, ...]:
    """Returns the calls of a list; none where one of its items is no call."""
    calls = [call_of(item) for item in value] if isinstance(value, list) else []
    found = tuple(call for call in calls if call is not None)
    return found if len(found) == len(calls) else ()


def _named(head: str, value: object) -> tuple[ToolCall, ...]:
    match = _HEAD.fullmatch(head)
    if match is None or not is_name(match[1]) or not isinstance(value, dict):
        return ()
    return (ToolCall(match[1], arguments_text(value)),)


# Templates of Mistral refuse ids of another length.
MISTRAL = Family(name="mistral", markers=(MARKER, _ID, _ARGS), begin=begin_mistral, take=take_mistral, id_characters=9)
