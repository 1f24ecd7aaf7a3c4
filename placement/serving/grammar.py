"""Fixes how grammars are compiled: who tries a client's grammar and who then follows it must agree."""

import json
from typing import Literal, TypedDict

GrammarKind = Literal["json_schema", "regex", "lark"]
"""Says how a grammar is written: a field of worker.v1.Grammar."""

ENDS_TOO_SOON = "the grammar ends the answer before it has min_tokens"
"""Why an answer cannot go on whose grammar would end it, in a clause that ends what a replica says of it."""

MAX_SOURCE_BYTES = 64 * 1024
# The most white space between two tokens of JSON. Without a limit a weak model fills the rest of its context with it.
MAX_WHITESPACE = 32


class JsonOptions(TypedDict, total=False):
    """The options of llguidance for JSON Schemas, as ``llguidance.JsonCompileOptions`` has them."""

    item_separator: str | None
    key_separator: str | None
    whitespace_pattern: str | None
    whitespace_flexible: bool | None
    coerce_one_of: bool | None
    lenient: bool | None
    json_allowed_escapes: str | None
    json_allow_general_unicode_escapes: bool | None


WHITESPACE_OPTION = "whitespace_flexible"
"""The key of ``x-guidance`` that a client's schema may set, at its root alone."""

# Given as overrides, they go before what a schema says in "x-guidance", so that every answer is JSON that fits it.
_COMPACT: JsonOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": None,
    "json_allow_general_unicode_escapes": False,
}
_FLEXIBLE: JsonOptions = {
    **_COMPACT,
    "whitespace_flexible": True,
    "whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MAX_WHITESPACE}}}",
}


def json_options(schema: str) -> JsonOptions:
    """Returns the options for a JSON Schema: no white space, unless its ``x-guidance`` has ``WHITESPACE_OPTION``.

    A weak model that may choose fills an answer with blanks, and pays a token for each of them.
    """
    try:
        root = json.loads(schema)
    except (ValueError, RecursionError):  # the compiler says what is wrong with it
        return _COMPACT
    options = root.get("x-guidance") if isinstance(root, dict) else None
    return _FLEXIBLE if isinstance(options, dict) and options.get(WHITESPACE_OPTION) is True else _COMPACT
