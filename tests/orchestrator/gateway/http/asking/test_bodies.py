"""Bodies become requests of the gRPC service, and what cannot be honoured is refused by its name."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gateway.http.asking.body import read_body
from orchestrator.gateway.http.asking.chat import ChatBody, chat_message
from orchestrator.gateway.http.asking.completion import CompletionBody, completion_messages
from orchestrator.gateway.http.asking.names import CHAT, COMPLETION, renamed
from orchestrator.gateway.http.asking.tokens import TokenizeBody, conversation
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

USER = {"role": "user", "content": "a"}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "$defs": {"x": {"type": "null"}}}},
}


def chat(**fields: Any) -> pb.GenerateRequest:
    data = json.dumps({"messages": [USER]} | fields).encode()
    return chat_message(read_body(ChatBody, data), request_id="id")


def completions(**fields: Any) -> tuple[pb.GenerateRequest, ...]:
    return completion_messages(
        read_body(CompletionBody, json.dumps({"prompt": "a"} | fields).encode()), request_id="id"
    )


def test_every_sampling_field_arrives() -> None:
    message = chat(
        model="m", n=3, seed=-1, stop="x", max_tokens=5, temperature=1, top_p=0.5, top_k=-1, min_p=0.1,
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, logit_bias={"7": -100}, min_tokens=2,
        stop_token_ids=[4], ignore_eos=True, priority=-3, cache_salt="s", logprobs=True, top_logprobs=4,
    )  # fmt: skip
    sampling = pb.SamplingParams(
        temperature=1, top_k=0, top_p=0.5, seed=2**64 - 1, min_p=0.1, repetition_penalty=1.5, presence_penalty=1,
        frequency_penalty=-1, logit_bias=[pb.LogitBias(token_id=7, bias=-100)],
    )  # fmt: skip
    assert message == pb.GenerateRequest(
        model="m", request_id="id", chat={"messages": [USER]}, sampling=sampling, max_tokens=5, num_choices=3,
        stop=["x"], stop_token_ids=[4], ignore_eos=True, priority=-3, cache_salt="s", min_tokens=2, logprobs=4,
    )  # fmt: skip


def test_null_is_the_same_as_nothing() -> None:
    fields = {name: None for name, field in ChatBody.model_fields.items() if not field.is_required()}
    assert chat(**fields) == chat()
    fields = {name: None for name, field in CompletionBody.model_fields.items() if not field.is_required()}
    assert completions(**fields) == completions()


def test_completions_have_the_defaults_of_the_openai_api() -> None:
    (message,) = completions()
    assert (message.max_tokens, message.echo, message.HasField("logprobs")) == (16, False, False)
    assert not chat().HasField("max_tokens")


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_of_all_kinds_are_read(prompt: Any, read: list[Any]) -> None:
    messages = completions(prompt=prompt)
    assert [message.prompt or list(message.prompt_ids.ids) for message in messages] == read
    assert len({message.request_id for message in messages}) == len(messages)


@pytest.mark.parametrize("prompt", [[], 1, [1.5], ["a", 1], [["a"]], [[]], [-1], [True], [2**32], None, ["a"] * 257])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completions(prompt=prompt)
    assert caught.value.field == "prompt"


def test_what_a_message_says_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "developer", "content": parts}]).chat.messages[0] == pb.ChatMessage(
        role="system", content="a\nb"
    )


def test_tools_are_written_as_templates_read_them() -> None:
    message = chat(tools=[TOOL], chat_template_kwargs={"enable_thinking": False})
    assert json.loads(message.chat.tools[0]) == TOOL
    assert json.loads(message.chat.template_values) == {"enable_thinking": False}
    assert not message.HasField("structured_output")
    assert not chat(tools=[TOOL], tool_choice="none").chat.tools


def test_a_forced_call_is_a_schema() -> None:
    named = chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}})
    assert json.loads(named.structured_output.json_schema) == TOOL["function"]["parameters"]  # type: ignore[index]
    schema = json.loads(chat(tools=[TOOL], tool_choice="required").structured_output.json_schema)
    assert schema["$defs"] == {"x": {"type": "null"}} and "maxItems" not in schema
    (call,) = schema["items"]["anyOf"]
    assert call["properties"]["name"] == {"const": "f"}
    one = chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    assert json.loads(one.structured_output.json_schema)["maxItems"] == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages[1].content"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"n": True}, "n"),
        ({"functions": []}, "functions"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"stream_options": {}}, "stream_options"),
        ({"tools": [{"type": "search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
        ),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("form", "kind", "source"),
    [
        ({"json": {"type": "object"}}, "json_schema", '{"type":"object"}'),
        ({"json": '{"type": "object"}'}, "json_schema", '{"type": "object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        ({"choice": ["yes", "no (a.b)"]}, "regex", r"yes|no \(a\.b\)"),
    ],
)
def test_grammars_in_the_form_of_vllm_are_read(form: dict[str, Any], kind: str, source: str) -> None:
    structured = chat(structured_outputs=form).structured_output
    assert (structured.WhichOneof("format"), getattr(structured, kind)) == (kind, source)
    for more in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": form | {"regex": "b", "json": {}}},
    ):
        with pytest.raises(InvalidRequest, match=r"^structured_outputs: "):
            chat(**{"structured_outputs": form} | more)


def test_definitions_of_one_name_that_differ_are_refused() -> None:
    other = json.loads(json.dumps(TOOL).replace('"f"', '"g"').replace('"null"', '"string"'))
    with pytest.raises(InvalidRequest, match=r"tools\[1\]"):
        chat(tools=[TOOL, other], tool_choice="required")


@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_body_breaks_the_reader(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_body(ChatBody, data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(fields=st.dictionaries(st.sampled_from(sorted(ChatBody.model_fields)), JSON, max_size=4))
def test_any_values_of_known_fields_are_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        chat(**fields)
    except InvalidRequest as error:
        assert error.field.partition("[")[0].partition(".")[0] in ChatBody.model_fields


def test_an_error_repeats_no_text() -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(messages=[{"role": "user", "content": {"secret": "words"}}])
    assert "secret" not in str(caught.value) and "words" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("sampling.temperature", "temperature"), ("sampling.logit_bias[0].bias", "logit_bias"),
        ("prompt_ids.ids[3]", "prompt[3]"), ("num_choices", "n"), ("stop[1]", "stop[1]"),
        ("structured_output.json_schema", "response_format"),
    ],
)  # fmt: skip
def test_fields_have_the_names_of_the_body(field: str, name: str) -> None:
    error = InvalidRequest(field=field, value=1, problem="is wrong", fix="Leave structured_output out.")
    assert renamed(error, COMPLETION).field == name
    assert renamed(error, COMPLETION).fix == "Leave response_format out."
    assert renamed(InvalidRequest(field="prompt", problem="is wrong", fix="Cut it."), CHAT).field == "messages"


@pytest.mark.parametrize("fields", [{}, {"prompt": "a", "messages": [USER]}])
def test_either_a_text_or_a_conversation_is_tokenized(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        conversation(read_body(TokenizeBody, json.dumps(fields).encode()))
