"""Tools in chat templates, against transformers' apply_chat_template."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from orchestrator.model_dir.chat import ChatTemplate, Message
from tests.support.clocks import PATIENCE_S
from tests.support.gateway.chat_templates import CHATML, HEADERS
from tests.support.gateway.tool_templates import HERMES
from tests.support.tokenizer import save_tokenizer

TOKENS = {"bos_token": "<|b|>", "eos_token": "<|e|>", "pad_token": "<|pad|>"}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": "Über é", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g"}},
]
CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": ["<&>", 1]}}}]


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """Renders are not stopped because the machine is busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.model_dir.chat.MAX_RENDER_S", PATIENCE_S)
        yield


def test_a_conversation_with_tools_is_written_as_by_transformers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **TOKENS)
    turns = [
        Message(role="user", content="Do it"),
        Message(role="assistant", content="", more={"tool_calls": CALLS}),
        Message(role="tool", content="done", more={"tool_call_id": "c", "name": "f"}),
    ]
    dicts = [{"role": turn.role, "content": turn.content, **turn.more} for turn in turns]
    template = ChatTemplate(HERMES, special_tokens=TOKENS)
    for tools in (TOOLS, None):
        written = template.render(turns, add_generation_prompt=True, tools=tools)
        assert written == oracle.apply_chat_template(
            dicts, tools=tools, chat_template=HERMES, add_generation_prompt=True, tokenize=False
        )


@pytest.mark.parametrize(("source", "takes"), [(HERMES, True), (HEADERS, True), (CHATML, False)])
def test_it_is_known_whether_a_template_takes_tools(source: str, takes: bool) -> None:
    assert ChatTemplate(source, special_tokens={}).takes_tools is takes


def test_further_values_reach_the_template_and_replace_none_of_its_own() -> None:
    template = ChatTemplate("{{ think }}{{ bos_token }}{{ messages|length }}", special_tokens=TOKENS)
    values = {"think": "no ", "bos_token": "x", "messages": [], "the deadline": 0}
    turns = [Message(role="user", content="a")]
    assert template.render(turns, add_generation_prompt=True, values=values) == "no <|b|>1"
