"""Reads calls as Hermes and Qwen models write them: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``. Pure."""

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

BEGIN, END = "<tool_call>", "</tool_call>"


def begin_hermes(place: Place, text: str) -> Begin:
    """Finds the first call."""
    return find_marker(text, BEGIN)


def take_hermes(text: str, is_end: bool) -> tuple[tuple[Item, ...], int] | None:
    """Takes the call that begins the text. Its end may be missing where the model has left it out."""
    start = len(text) - len(text[len(BEGIN) :].lstrip())
    if start < len(text) and text[start] != "{":
        return (text[:start],), start
    stop = end_of_value(text, start)
    if stop is None:
        return ((text,), len(text)) if is_end else None
    after = text[stop:].lstrip()
    if not is_end and END.startswith(after) and after != END:
        return None
    end = len(text) - len(after) + len(END) if after.startswith(END) else stop
    call = call_of(json_of(text[start:stop]))
    return (text[:end] if call is None else call,), end


HERMES = Family(name="hermes", markers=(BEGIN, END), begin=begin_hermes, take=take_hermes)
