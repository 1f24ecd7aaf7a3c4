"""Calls of tools are found however the text is cut, and what is none stays text."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gateway.http.tools.families import family_of, forced
from orchestrator.gateway.http.tools.hermes import HERMES
from orchestrator.gateway.http.tools.llama3 import LLAMA3
from orchestrator.gateway.http.tools.mistral import MISTRAL
from orchestrator.gateway.http.tools.reading import Family, Item, ToolCall, ToolStream

FAMILIES = (HERMES, LLAMA3, MISTRAL)

# Of what texts are made that are hard to read.
PIECES = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<|python_tag|>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "<tool",
            "[TOOL",
            "<|",
        ),
        *('{"name": "f", "arguments": {}}', '{"name": "g", "parameters": {"a": "}"}}', '{"name": 1}', "x" * 600),
        *("{", "}", "[", "]", '"', "\\", ";", ",", "\n", " ", "f", "text", "é"),
    ]
)
NAMES = st.from_regex(r"[A-Za-z0-9_.\-]{1,12}", fullmatch=True)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)
ARGUMENTS = st.dictionaries(TEXTS, st.recursive(st.integers() | TEXTS | st.none(), st.lists, max_leaves=5), max_size=4)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)


def read(family: Family, *pieces: str) -> list[Item]:
    """What is read of a text that comes in pieces; texts beside each other are joined."""
    stream = ToolStream(family)
    items = [item for piece in pieces for item in stream.push(piece)] + list(stream.finish())
    joined: list[Item] = []
    for item in items:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    return joined


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:stop] for start, stop in pairwise(bounds)]


def hermes(calls: list[tuple[str, dict[str, Any]]]) -> str:
    bodies = (json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in calls)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def llama3(calls: list[tuple[str, dict[str, Any]]]) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)


def mistral_list(calls: list[tuple[str, dict[str, Any]]]) -> str:
    return "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


def mistral_named(calls: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@given(pieces=st.lists(PIECES, max_size=12), places=st.lists(st.integers(0, 10_000), max_size=40))
def test_the_same_is_found_however_a_text_is_cut(family: Family, pieces: list[str], places: list[int]) -> None:
    text = "".join(pieces)
    whole = read(family, text)
    assert read(family, *cut(text, places)) == whole
    assert read(family, *text) == whole


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@given(text=st.text(alphabet="ab\n .,é<[", max_size=60))
def test_a_text_without_calls_comes_through_unchanged(family: Family, text: str) -> None:
    assert "".join(str(item) for item in read(family, *text)) == text


@pytest.mark.parametrize(
    ("family", "write"),
    [(HERMES, hermes), (LLAMA3, llama3), (MISTRAL, mistral_list), (MISTRAL, mistral_named)],
    ids=["hermes", "llama3", "mistral-list", "mistral-named"],
)
@given(calls=CALLS, places=st.lists(st.integers(0, 10_000), max_size=40))
def test_what_a_model_calls_is_read_whole(
    family: Family, write: Any, calls: list[tuple[str, dict[str, Any]]], places: list[int]
) -> None:
    found = read(family, *cut(write(calls), places))
    assert [(item.name, json.loads(item.arguments)) for item in found if isinstance(item, ToolCall)] == calls
    assert len(found) == len(calls)


def call(name: str, **arguments: object) -> ToolCall:
    return ToolCall(name, json.dumps(arguments))


@pytest.mark.parametrize(
    ("family", "text", "items"),
    [
        (HERMES, 'See.\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', ["See.", call("f", a=1)]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}', [call("f", a=1)]),  # its end was not written
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1', ['<tool_call>{"name": "f", "arguments": {"a": 1']),
        (HERMES, '<tool_call>{"nome": "f"}</tool_call> so', ['<tool_call>{"nome": "f"}</tool_call> so']),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [call("f", a=1)]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', [call("f")]),
        (HERMES, '<tool_call>{"name": "f", "a": NaN}</tool_call>', ['<tool_call>{"name": "f", "a": NaN}</tool_call>']),
        (HERMES, "if a <tool_b then", ["if a <tool_b then"]),
        (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', [call("f", a=1)]),
        (LLAMA3, 'Sure: {"name": "f", "parameters": {}}', ['Sure: {"name": "f", "parameters": {}}']),
        (LLAMA3, 'Sure. <|python_tag|>{"name": "f", "parameters": {}}', ["Sure.", call("f")]),
        (LLAMA3, '{"answer": 42}', ['{"answer": 42}']),
        (MISTRAL, 'Ok [TOOL_CALLS] [{"name": "f", "arguments": {}}]', ["Ok", call("f")]),
        (MISTRAL, '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"a": 1}', [call("f", a=1)]),
        (MISTRAL, '[TOOL_CALLS]f{"a": 1}', [call("f", a=1)]),
        (MISTRAL, "[TOOL_CALLS]not a call {}", ["[TOOL_CALLS]not a call {}"]),
        (MISTRAL, '[TOOL_CALLS][{"name": "f"}, 1]', ['[TOOL_CALLS][{"name": "f"}, 1]']),
        (forced(None, HERMES), '[{"name": "f", "parameters": {"a": 1}}, {"name": "g"}]', [call("f", a=1), call("g")]),
        (forced(None, HERMES), '[{"name": "f", "par', ['[{"name": "f", "par']),
        (forced("f", HERMES), '{"a": 1}', [call("f", a=1)]),
        (forced("f", HERMES), '{"a": ', [ToolCall("f", '{"a": ')]),
    ],
)  # fmt: skip
def test_calls_and_texts_are_told_apart(family: Family, text: str, items: list[Item]) -> None:
    assert read(family, text) == items
    assert read(family, *text) == items


def test_a_text_is_passed_on_before_a_call_begins() -> None:
    stream = ToolStream(HERMES)
    assert stream.push("Let me see.") == ("Let me see.",)
    assert stream.push("\n<tool") == ()
    assert stream.push("box>") == ("\n<toolbox>",)


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{{ '[TOOL_CALLS]' }}", MISTRAL),
        ('Respond as {"name": function name, "parameters": dictionary of argument name and its value}.', LLAMA3),
        ("{{ messages }}", None),
    ],
)  # fmt: skip
def test_a_template_says_which_form_it_asks_for(template: str, family: Family | None) -> None:
    assert family_of(template) is family
