"""Reads a client's JSON Schema and refuses what would not be enforced, instead of ignoring it. Pure.

A JSON Schema may hold any keyword, and an unknown one means nothing: a misspelt ``requierd`` would silently ask for
less. Here every keyword must be one that answers are held to, a note of a kind in common use, or a note with the
prefix ``x-``.
"""

import json
from collections.abc import Iterator

from orchestrator.brief import brief
from orchestrator.gateway.request.shown import shown
from placement.errors import InvalidRequest
from placement.serving.grammar import WHITESPACE_OPTION

# Beyond it a JSON number is not the same integer to every reader (RFC 8259, section 6).
MAX_INTEGER = 2**53 - 1
MAX_DEPTH = 50

_FIELD = "structured_output.json_schema"
_PROBLEM_CHARACTERS = 400  # the way to a schema deep within is long
_ONE_SCHEMA = frozenset({"items", "additionalItems", "additionalProperties"})
_SCHEMA_LISTS = frozenset({"items", "prefixItems", "anyOf", "oneOf", "allOf"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_VALUES = frozenset({"const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_OTHERS = frozenset(
    {"$ref", "type", "required", "pattern", "format", "minLength", "maxLength", "minItems", "maxItems"}
    | {"minProperties", "maxProperties"}
)
_NOTES = frozenset(
    {"$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "example", "examples"}
    | {"readOnly", "writeOnly", "deprecated", "contentEncoding", "contentMediaType", "contentSchema", "discriminator"}
)
_KNOWN = _ONE_SCHEMA | _SCHEMA_LISTS | _NAMED_SCHEMAS | _VALUES | _OTHERS | _NOTES


def normalize_schema(text: str) -> str:
    """Returns the schema, checked, as JSON text of one form; ``true``, which allows everything, becomes ``{}``.

    Raises:
        InvalidRequest: the text is not JSON, or no schema, or says what answers would not be held to.
    """
    try:
        schema = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise _refusal(shown(text), "is not a JSON object", 'Send a JSON Schema, such as {"type": "object"}.')
        _check(schema)
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    except ValueError as error:
        raise _refusal(shown(text), f"is not JSON ({error})", "Send a JSON Schema as JSON text.") from error
    except RecursionError as error:
        raise _too_deep() from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:40]!r} occurs twice in one object")
        found[name] = value
    return found


def _constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _check(schema: dict[str, object]) -> None:
    """Checks every schema within ``schema``, itself first, with a list in place of recursion."""
    left: list[tuple[str, int, object]] = [("#", 1, schema)]
    while left:
        path, depth, current = left.pop()
        if depth > MAX_DEPTH:
            raise _too_deep()
        if isinstance(current, dict):
            for keyword, value in current.items():
                _check_keyword(path, keyword, value)
                if keyword in _VALUES:
                    _check_numbers(f"{path}/{keyword}", value)
                left.extend((at, depth + 1, inner) for at, inner in _subschemas(path, keyword, value))
        elif not isinstance(current, bool):
            raise _refusal(current, f"has no schema at {path}", "Write an object, true or false there.")


def _check_keyword(path: str, keyword: str, value: object) -> None:
    if keyword == "x-guidance" and not (path == "#" and _is_about_whitespace(value)):
        fix = f'Leave them out; only {{"{WHITESPACE_OPTION}": true}} may be there, at the root.'
        raise _refusal(keyword, f"has options at {path} that are the service's to choose", fix)
    if keyword not in _KNOWN and not keyword.startswith("x-"):
        raise _refusal(
            keyword,
            f"has a keyword at {path} that answers would not be held to",
            f"Leave it out, or name it x-{keyword[:40]} if it is a note.",
        )


def _is_about_whitespace(options: object) -> bool:
    return isinstance(options, dict) and all(
        name == WHITESPACE_OPTION and isinstance(value, bool) for name, value in options.items()
    )


def _subschemas(path: str, keyword: str, value: object) -> Iterator[tuple[str, object]]:
    if keyword in _NAMED_SCHEMAS and isinstance(value, dict):
        yield from ((f"{path}/{keyword}/{name[:40]}", inner) for name, inner in value.items())
    elif keyword in _SCHEMA_LISTS and isinstance(value, list):
        yield from ((f"{path}/{keyword}/{index}", inner) for index, inner in enumerate(value))
    elif keyword in _ONE_SCHEMA:
        yield f"{path}/{keyword}", value
    elif keyword in _NAMED_SCHEMAS or keyword in _SCHEMA_LISTS:
        raise _refusal(value, f"has a value at {path}/{keyword} of the wrong type", "Correct it.")


def _check_numbers(path: str, value: object) -> None:
    """Refuses numbers in ``value``, however deep, that are not finite or too large to be exact."""
    left = [value]
    while left:
        current = left.pop()
        if isinstance(current, dict):
            left.extend(current.values())
        elif isinstance(current, list):
            left.extend(current)
        # Written so that a NaN is refused too; an int of any size can be compared.
        elif isinstance(current, int | float) and not abs(current) <= MAX_INTEGER:
            raise _refusal(
                current, f"has a number at {path} that is too large to be exact", f"Keep within +-{MAX_INTEGER}."
            )


def _too_deep() -> InvalidRequest:
    return _refusal("", f"is nested more than {MAX_DEPTH} deep", "Move inner schemas to $defs.")


def _refusal(value: object, problem: str, fix: str) -> InvalidRequest:
    short = shown(value if isinstance(value, str) else repr(value))
    return InvalidRequest(field=_FIELD, value=short, problem=brief(problem, _PROBLEM_CHARACTERS), fix=brief(fix))
