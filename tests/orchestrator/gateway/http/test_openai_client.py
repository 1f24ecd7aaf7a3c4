"""The client that users have, over real worker processes: its answers are those of the gRPC service."""

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.clocks import PATIENCE_S, until
from tests.support.deploying.deployment import Deployment
from tests.support.gateway.answers import PROMPT, answer, choices, text, tokens

# One deployment serves all tests, so they share its event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "talker"
MESSAGES: Any = [{"role": "system", "content": "Be good."}, {"role": "user", "content": "In the beginning"}]
IDS = {"return_token_ids": True}
GO_ON = {"ignore_eos": True}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a verse up.",
        "parameters": {
            "type": "object",
            "properties": {"chapter": {"type": "integer", "minimum": 1, "maximum": 9}, "aloud": {"type": "boolean"}},
            "required": ["chapter", "aloud"],
            "additionalProperties": False,
        },
    },
}
OTHER: Any = {"type": "function", "function": {"name": "stop"}}


def chat_request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat={"messages": MESSAGES}, **fields)


async def collected(stream: Any) -> tuple[dict[int, str], dict[int, str], Any]:
    """The content and the finish reason of each choice of a stream, and what was used."""
    content: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            said = choice.delta.content if hasattr(choice, "delta") else choice.text
            content[choice.index] = content.get(choice.index, "") + (said or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return content, reasons, usage


async def test_greedy_completions_have_the_tokens_of_the_grpc_service(client: Any, stub: Any) -> None:
    by_grpc = await answer(stub, pb.GenerateRequest(prompt=PROMPT, max_tokens=24, ignore_eos=True))
    by_http = await client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, extra_body=IDS | GO_ON
    )
    (choice,) = by_http.choices
    assert (choice.token_ids, choice.text, choice.finish_reason) == (tokens(by_grpc), text(by_grpc), "length")
    used = by_grpc[-1].finished.usage
    assert (by_http.usage.prompt_tokens, by_http.usage.completion_tokens) == (used.prompt_tokens, 24)
    assert by_http.model == MODEL


async def test_greedy_chats_have_the_tokens_of_the_grpc_service(client: Any, stub: Any) -> None:
    by_grpc = await answer(stub, chat_request(max_tokens=24, ignore_eos=True))
    by_http = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=24, extra_body=IDS | GO_ON
    )
    (choice,) = by_http.choices
    assert (choice.token_ids, choice.message.content) == (tokens(by_grpc), text(by_grpc))
    assert choice.message.role == "assistant"


async def test_a_stream_adds_up_to_the_answer_in_one_piece(client: Any) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 3}
    whole = await client.chat.completions.create(**asked)
    stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    content, reasons, usage = await collected(stream)
    assert content == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


async def test_the_synchronous_client_is_served_likewise(deployment: Deployment, client: Any) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "extra_body": GO_ON}
    expected = (await client.completions.create(**asked)).choices[0].text

    def ask() -> str:
        url = f"http://{deployment.gateway.http_address}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as other:
            assert [model.id for model in other.models.list()] == [MODEL]
            assert other.models.retrieve(MODEL).max_model_len == 512  # type: ignore[attr-defined]
            return "".join(chunk.choices[0].text for chunk in other.completions.create(**asked, stream=True))

    assert await asyncio.to_thread(ask) == expected


async def test_sampling_fields_mean_what_they_mean_over_grpc(client: Any, stub: Any) -> None:
    sampling = {
        "temperature": 0.9, "top_p": 0.9, "seed": 42, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1,
    }  # fmt: skip
    message = pb.GenerateRequest(prompt=PROMPT, max_tokens=16, num_choices=2, sampling=sampling, min_tokens=16)
    message.sampling.logit_bias.add(token_id=100, bias=3.0)
    of_vllm = {name: sampling.pop(name) for name in ("top_k", "min_p", "repetition_penalty")}
    by_http = await client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=16, n=2, logit_bias={"100": 3.0}, **sampling,
        extra_body={**of_vllm, **IDS, "min_tokens": 16, "priority": 3, "cache_salt": "mine"},
    )  # fmt: skip
    expected = choices(await answer(stub, message))
    assert {choice.index: choice.token_ids for choice in by_http.choices} == expected


async def test_prompts_may_be_texts_or_token_ids_or_lists_of_either(client: Any, stub: Any) -> None:
    texts = [PROMPT, "And the spirit"]
    ids = [list((await stub.Tokenize(pb.TokenizeRequest(text=each))).ids) for each in texts]

    async def ask(prompt: Any) -> list[str]:
        answered = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, extra_body=GO_ON)
        return [choice.text for choice in answered.choices]

    one, other = (await ask(texts[0]))[0], (await ask(texts[1]))[0]
    assert await ask(texts) == await ask(ids) == [one, other]
    assert await ask(ids[0]) == [one]
    streamed, _, _ = await collected(
        await client.completions.create(model=MODEL, prompt=texts, max_tokens=6, stream=True, extra_body=GO_ON)
    )
    assert streamed == {0: one, 1: other}


async def test_a_stop_string_ends_the_text(client: Any) -> None:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 40, "extra_body": GO_ON}
    whole = (await client.completions.create(**asked)).choices[0].text
    stop = whole[6:9]
    for stops in (stop, ["never there", stop]):
        (choice,) = (await client.completions.create(**asked, stop=stops)).choices
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (whole[: whole.index(stop)], "stop", stop)
        content, reasons, _ = await collected(await client.completions.create(**asked, stop=stops, stream=True))
        assert (content, reasons) == ({0: choice.text}, {0: "stop"})


@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_an_echo_scores_the_prompt_as_the_grpc_service_does(client: Any, stub: Any, max_tokens: int) -> None:
    by_grpc = await answer(
        stub, pb.GenerateRequest(prompt=PROMPT, max_tokens=max_tokens, echo=True, logprobs=2, ignore_eos=True)
    )
    expected = [token for response in by_grpc for token in (*response.echo.tokens, *response.chunk.tokens)]
    by_http = await client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=max_tokens, echo=True, logprobs=2, extra_body=IDS | GO_ON
    )
    (choice,) = by_http.choices
    scored = choice.logprobs
    assert choice.text.startswith(PROMPT) and choice.token_ids == [token.id for token in expected]
    assert scored.token_logprobs[0] is None and scored.top_logprobs[0] is None
    assert scored.token_logprobs[1:] == pytest.approx([token.logprob for token in expected[1:]], abs=1e-4)
    for token, top, name in zip(expected[1:], scored.top_logprobs[1:], scored.tokens[1:], strict=True):
        assert name in top and len(top) <= 3
        assert max(top.values()) == pytest.approx(token.top[0].logprob, abs=1e-4)
    assert scored.text_offset == sorted(scored.text_offset)
    named = scored.tokens[1]
    assert choice.text[scored.text_offset[1] :].startswith(named)


async def test_the_log_probabilities_of_a_chat_are_those_of_the_grpc_service(client: Any, stub: Any) -> None:
    by_grpc = await answer(stub, chat_request(max_tokens=6, logprobs=3, ignore_eos=True))
    expected = [token for response in by_grpc for token in response.chunk.tokens]
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    whole = (await client.chat.completions.create(**asked, extra_body=GO_ON)).choices[0].logprobs.content
    stream = await client.chat.completions.create(**asked, stream=True, extra_body=GO_ON)
    streamed = [entry async for chunk in stream for c in chunk.choices if c.logprobs for entry in c.logprobs.content]
    for entries in (whole, streamed):
        assert [entry.logprob for entry in entries] == pytest.approx([t.logprob for t in expected], abs=1e-4)
        for entry, token in zip(entries, expected, strict=True):
            tops = [top.logprob for top in entry.top_logprobs]
            assert tops == pytest.approx([top.logprob for top in token.top], abs=1e-4)


class Verse(BaseModel):
    chapter: int
    aloud: bool


async def test_an_answer_matches_the_schema_that_was_sent(client: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["yes", "no"]}}, "required": ["a"]}
    sampled = {"model": MODEL, "messages": MESSAGES, "temperature": 1.0, "seed": 3}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema | {"additionalProperties": False}},
    }
    (choice,) = (await client.chat.completions.create(**sampled, response_format=form)).choices
    assert json.loads(choice.message.content)["a"] in ("yes", "no")
    chosen = await client.completions.create(
        model=MODEL, prompt=PROMPT, extra_body={"structured_outputs": {"choice": ["yes.", "no (or so)"]}}
    )
    assert chosen.choices[0].text in ("yes.", "no (or so)")
    parsed = await client.chat.completions.parse(**sampled, response_format=Verse)
    assert isinstance(parsed.choices[0].message.parsed, Verse)


async def test_a_named_tool_gets_arguments_that_match_its_schema(client: Any) -> None:
    asked = {
        "model": MODEL, "messages": MESSAGES, "tools": [OTHER, TOOL], "temperature": 1.0, "seed": 5,
        "tool_choice": {"type": "function", "function": {"name": "look_up"}},
    }  # fmt: skip
    (choice,) = (await client.chat.completions.create(**asked)).choices
    (call,) = choice.message.tool_calls
    assert (call.function.name, choice.finish_reason, choice.message.content) == ("look_up", "stop", None)
    Verse.model_validate_json(call.function.arguments, strict=True)
    streamed = await calls_of(await client.chat.completions.create(**asked, stream=True))
    assert streamed == [("look_up", call.function.arguments)]


async def test_a_call_that_is_required_is_one_of_the_tools(client: Any) -> None:
    asked = {
        "model": MODEL, "messages": MESSAGES, "tools": [OTHER, TOOL], "temperature": 1.0, "seed": 6,
        "tool_choice": "required", "parallel_tool_calls": False,
    }  # fmt: skip
    (choice,) = (await client.chat.completions.create(**asked)).choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.function.name in ("look_up", "stop") and isinstance(json.loads(call.function.arguments), dict)
    streamed = await calls_of(await client.chat.completions.create(**asked, stream=True))
    assert streamed == [(call.function.name, call.function.arguments)]


async def calls_of(stream: Any) -> list[tuple[str, str]]:
    """The calls of a stream, as clients put them together."""
    calls: dict[int, list[str]] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                found = calls.setdefault(call.index, ["", ""])
                found[0] += call.function.name or ""
                found[1] += call.function.arguments or ""
    return [(name, arguments) for name, arguments in calls.values()]


async def test_a_whole_conversation_with_tools_is_written_out_by_the_template(
    client: Any, deployment: Deployment
) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"chapter": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Read"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "In the beginning"},
    ]
    answered = await client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL], max_tokens=2)
    assert answered.usage.completion_tokens <= 2
    body = {"messages": messages, "tools": [TOOL]}
    tokenized = await client.post("/../tokenize", body=body, cast_to=dict[str, Any])
    assert tokenized["count"] == answered.usage.prompt_tokens
    written = await client.post("/../detokenize", body={"tokens": tokenized["tokens"]}, cast_to=dict[str, Any])
    assert '<tool_call>\n{"name": "look_up", "arguments": {"chapter": 1}}\n</tool_call>' in written["prompt"]
    assert json.dumps(TOOL) in written["prompt"] and written["prompt"].endswith("<|b|>assistant\n")


async def test_tokens_are_those_of_the_grpc_service_both_ways(client: Any, stub: Any) -> None:
    ids = list((await stub.Tokenize(pb.TokenizeRequest(text=PROMPT))).ids)
    body = {"model": MODEL, "prompt": PROMPT, "return_token_strs": True}
    tokenized = await client.post("/../tokenize", body=body, cast_to=dict[str, Any])
    assert (tokenized["tokens"], tokenized["count"], tokenized["max_model_len"]) == (ids, len(ids), 512)
    assert len(tokenized["token_strs"]) == len(ids)
    detokenized = await client.post("/../detokenize", body={"tokens": [1, *ids, 2]}, cast_to=dict[str, Any])
    assert detokenized == {"prompt": f"<|b|>{PROMPT}<|e|>"}


async def test_the_tokenizer_is_described(client: Any) -> None:
    info = await client.get("/../tokenizer_info", cast_to=dict[str, Any])
    assert (info["bos_token"], info["eos_token"]) == ("<|b|>", "<|e|>")
    assert "<tool_call>" in info["chat_template"] and info["tokenizer_class"]


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature", None),
        ({"n": 100}, openai.BadRequestError, "n", None),
        ({"max_tokens": 10_000}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        (
            {"max_completion_tokens": 10_000}, openai.BadRequestError, "max_completion_tokens",
            "context_length_exceeded",
        ),
        ({"messages": []}, openai.BadRequestError, "messages", None),
        ({"messages": [{"role": "user", "content": 1}]}, openai.BadRequestError, "messages[0].content", None),
        (
            {"messages": [{"role": "user", "content": "a " * 2000}]}, openai.BadRequestError, "messages",
            "context_length_exceeded",
        ),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "stop", None),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias", None),
        ({"logit_bias": {"1": 1000}}, openai.BadRequestError, "logit_bias", None),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", None),
        ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "top_logprobs", None),
        ({"extra_body": {"tempratur": 1}}, openai.BadRequestError, "tempratur", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"requierd": []}}}},
            openai.BadRequestError, "response_format", None,
        ),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", None),
        ({"tools": [TOOL, TOOL]}, openai.BadRequestError, "tools[1].function.name", None),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            openai.BadRequestError, "tool_choice", None,
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_names_the_field_as_it_was_written(
    client: Any, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str, code: str | None, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "stream": stream} | fields)
    body: Any = caught.value.body
    assert (body["param"], body["code"], body["type"]) == (param, code, "invalid_request_error")
    assert body["message"].startswith(param)


async def test_a_client_that_leaves_its_stream_stops_the_computation(client: Any, deployment: Deployment) -> None:
    for _ in range(3):
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, n=4, temperature=1.0, extra_body=GO_ON
        )
        await anext(aiter(stream))
        await stream.close()
        await until(lambda: deployment.gateway.admission.in_flight == 0)
