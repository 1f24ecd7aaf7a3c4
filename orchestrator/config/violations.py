"""Owns the words for a refused value: turns what pydantic found into field, value, problem and fix."""

import json
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config.source import Key, Layers
from placement.errors import InvalidConfig

T = TypeVar("T")

_KINDS = {
    "int_type": ("is not a whole number", "Write it without quotes, fraction or unit."),
    "int_from_float": ("is not a whole number", "Write it without quotes, fraction or unit."),
    "int_parsing_size": ("is too large a number", "Write a smaller one."),
    "float_type": ("is not a number", "Write it without quotes or unit."),
    "finite_number": ("is not a finite number", "Write a number."),
    "string_type": ("is not text", "Put it in quotes."),
    "dataclass_type": ("is not a section", "Write key: value lines, indented, under it."),
    "dict_type": ("is not a section", "Write key: value lines, indented, under it."),
    "mapping_type": ("is not a section", "Write key: value lines, indented, under it."),
    "tuple_type": ("is not a list", "Write each entry on a line of its own that starts with '- '."),
    "missing": ("is missing", "Add it."),
}


def collect(
    adapter: TypeAdapter[T], root: type[T], layers: Layers
) -> tuple[T, list[InvalidConfig]] | tuple[None, list[InvalidConfig]]:
    """Returns the validated configuration, or every violation in it. ``root`` is the dataclass of ``adapter``."""
    try:
        # JSON mode: the strict mode in which lists may become tuples and mappings dataclasses.
        return adapter.validate_json(json.dumps(layers.values, default=str)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, [_refusal(root, detail, layers) for detail in details if not _is_echo(detail)]


def _is_echo(detail: ErrorDetails) -> bool:
    """Tells whether a list is too short only because its entries were refused."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _refusal(root: type, detail: ErrorDetails, layers: Layers) -> InvalidConfig:
    key, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    value = None if kind == "missing" else detail["input"]
    if kind == "unexpected_keyword_argument":
        problem, fix = "is not a known key", _nearest_key(root, key)
    elif kind == "refused":
        problem, fix = context["problem"], context["fix"]
    elif kind == "literal_error":
        problem, fix = f"is not one of {context['expected']}", _nearest_word(value, context["expected"])
    elif kind in _KINDS:
        problem, fix = _KINDS[kind]
    else:
        problem, fix = _range(kind, context, detail["msg"])
    return layers.refusal(key, value, problem, fix)


def _range(kind: str, context: dict[str, Any], message: str) -> tuple[str, str]:
    match kind:
        case "greater_than_equal":
            return f"is below {context['ge']}", f"Set it to {context['ge']} or more."
        case "less_than_equal":
            return f"is above {context['le']}", f"Set it to {context['le']} or less."
        case "greater_than":
            return f"is not above {context['gt']}", f"Set it to more than {context['gt']}."
        case "too_short" | "string_too_short":
            return "is empty", "Give at least one." if kind == "too_short" else "Give a name."
        case "too_long" | "string_too_long":
            return "is too long", f"Give at most {context['max_length']}."
    return message[:1].lower() + message[1:], "See `heterodyne schema`."


def _nearest_word(value: object, expected: str) -> str:
    words = expected.replace("'", "").replace(" or ", ", ").split(", ")
    near = get_close_matches(str(value), words, n=1)
    return f"Did you mean {near[0]}?" if near else f"Write {words[0]}, for instance."


def _nearest_key(root: type, key: Key) -> str:
    """Says which key was meant: the closest one of the same section, else the same name in another section."""
    name, siblings = str(key[-1]), [item.name for item in fields(_section(root, key[:-1]))]
    near = get_close_matches(name, siblings, n=1)
    elsewhere = [dotted for dotted in _dotted_keys(root) if dotted.rpartition(".")[2] == name]
    if near or elsewhere:
        return f"Did you mean {(near or elsewhere)[0]}?"
    return f"Known here: {', '.join(siblings)}."


def _section(root: type, key: Key) -> type:
    """Returns the dataclass that holds the keys under ``key``."""
    for part in key:
        if isinstance(part, str):
            hint = get_type_hints(root)[part]
            root = get_args(hint)[0] if get_args(hint) else hint
    return root


def _dotted_keys(root: type) -> Iterator[str]:
    for section, kind in get_type_hints(root).items():
        if section != "__pydantic_config__":
            yield from (f"{section}.{item.name}" for item in fields(kind))
