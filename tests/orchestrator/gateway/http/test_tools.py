"""Calls of tools from the replica's tokens to the client, and back into the next prompt."""

import asyncio
from dataclasses import replace
from typing import Any

import openai
import pytest

from orchestrator.gateway.model import ServedModel
from tests.support.clocks import PATIENCE_S
from tests.support.gateway.byte_tokens import bytes_alone
from tests.support.gateway.generating import STOP, token, told
from tests.support.gateway.stub_gateway import StubGateway, served_model, stub_gateway
from tests.support.gateway.tool_templates import HERMES

TOKENIZER = bytes_alone()
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER: Any = {"role": "user", "content": "Do it"}
WORDS = 'Yes. <tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call>'


def talker() -> ServedModel:
    model = served_model(chat_template=HERMES, context=4096)
    return replace(model, tokenizer=TOKENIZER, spec=replace(model.spec, vocab_size=300))


async def says(gateway: StubGateway, text: str) -> str:
    """The replica answers the next request so; returns the prompt."""
    submit = await told(gateway.worker)
    (fork,) = submit.forks
    ids = TOKENIZER.encode(text).ids
    for index, token_id in enumerate(ids):
        gateway.worker.step(token(fork, index, token_id, end=STOP if index == len(ids) - 1 else None))
    return str(TOKENIZER.decode(list(submit.prompt_ids), skip_special_tokens=False))


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_model_calls_reaches_the_client_and_the_next_prompt(stream: bool) -> None:
    async with (
        stub_gateway(talker()) as gateway,
        openai.AsyncOpenAI(
            base_url=f"http://{gateway.http}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
        ) as client,
    ):
        saying = asyncio.create_task(says(gateway, WORDS))
        asked: dict[str, Any] = {"model": "letters", "messages": [USER], "tools": [TOOL]}
        if stream:
            async with client.chat.completions.stream(**asked) as answering:
                answer: Any = await answering.get_final_completion()
        else:
            answer = await client.chat.completions.create(**asked)
        assert '"name": "f"' in await saying, "the prompt names the tool"
        (choice,) = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("Yes.", "tool_calls")
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert calls == [("f", '{"a": "é"}'), ("g", "{}")]
        first, second = (call.id for call in choice.message.tool_calls)
        assert first != second

        saying = asyncio.create_task(says(gateway, "Done."))
        result = {"role": "tool", "tool_call_id": first, "content": "42"}
        messages = [USER, choice.message.model_dump(exclude_none=True), result]
        for call in messages[1]["tool_calls"]:
            call.pop("index", None)
            call["function"].pop("parsed_arguments", None)
        messages[1].pop("parsed", None)
        last = await client.chat.completions.create(model="letters", messages=messages, tools=[TOOL])
        assert last.choices[0].message.content == "Done." and last.choices[0].finish_reason == "stop"
        assert '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>' in await saying


async def test_without_parallel_calls_the_first_is_told_alone() -> None:
    async with (
        stub_gateway(talker()) as gateway,
        openai.AsyncOpenAI(
            base_url=f"http://{gateway.http}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
        ) as client,
    ):
        saying = asyncio.create_task(says(gateway, WORDS))
        answer = await client.chat.completions.create(
            model="letters", messages=[USER], tools=[TOOL], parallel_tool_calls=False
        )
        await saying
        (call,) = answer.choices[0].message.tool_calls or ()
        assert call.type == "function" and call.function.name == "f"
