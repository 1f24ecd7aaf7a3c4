"""Reads calls as Llama 3 models write them: ``{"name": …, "parameters": {…}}``, several with semicolons between. Pure.

They stand at the beginning of the answer, or behind the special token ``<|python_tag|>``.
"""

from orchestrator.gateway.http.tools.reading import (
    Begin,
    Family,
    Item,
    Place,
    call_of,
    end_of_value,
    find_marker,
    json_of,
)

TAG = "<|python_tag|>"
_NEXT = ";"


def begin_llama3(place: Place, text: str) -> Begin:
    """Finds the first call."""
    if place is not Place.TEXT:
        rest = text.lstrip()
        if not rest:
            return Begin(0, False)
        if place is Place.CALLS and rest[0] == _NEXT:
            after = rest[1:].lstrip()
            if not after or after[0] == "{":
                return Begin(len(text) - len(rest), bool(after))
        elif rest[0] == "{":
            return Begin(len(text) - len(rest), True)
    return find_marker(text, TAG)


def take_llama3(text: str, is_end: bool) -> tuple[tuple[Item, ...], int] | None:
    """Takes the call that begins the text, with the tag or the semicolon before it."""
    opening = TAG if text.startswith(TAG) else _NEXT if text.startswith(_NEXT) else ""
    start = len(text) - len(text[len(opening) :].lstrip())
    if start < len(text) and text[start] != "{":
        return (text[:start],), start
    stop = end_of_value(text, start)
    if stop is None:
        return ((text,), len(text)) if is_end else None
    call = call_of(json_of(text[start:stop]))
    return (text[:stop] if call is None else call,), stop


LLAMA3 = Family(name="llama3", markers=(TAG,), begin=begin_llama3, take=take_llama3)
