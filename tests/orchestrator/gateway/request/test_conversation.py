"""Conversations with tools, as clients of the gRPC service write them, become what templates read."""

from typing import Any

import pytest

from orchestrator.gateway.request.conversation import (
    MAX_MESSAGES,
    MAX_TOOLS,
    num_characters,
    read_messages,
    read_tools,
    read_values,
)
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

CALL = pb.ToolCall(id="c", name="f", arguments='{"a": 1}')


def test_a_turn_has_what_was_said_and_no_more() -> None:
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="user", content="a", name="Ada"),
            pb.ChatMessage(role="assistant", tool_calls=[CALL, pb.ToolCall(id="d", name="g")]),
            pb.ChatMessage(role="tool", content="b", tool_call_id="c"),
        ]
    )
    first, second, third = read_messages(chat)
    assert (first.role, first.content, first.more) == ("user", "a", {"name": "Ada"})
    assert second.more == {
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
            {"id": "d", "type": "function", "function": {"name": "g", "arguments": {}}},
        ]
    }
    assert third.more == {"tool_call_id": "c"}
    assert num_characters(chat) == len("usera" + "assistant" + 'f{"a": 1}' + "g" + "toolb")


def test_tools_and_values_are_json_objects() -> None:
    chat = pb.Chat(tools=['{"type": "function"}'], template_values='{"enable_thinking": false}')
    assert read_tools(chat) == [{"type": "function"}]
    assert read_values(chat) == {"enable_thinking": False}
    assert read_values(pb.Chat()) == {}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "chat.messages"),
        ({"messages": [{"role": "user"}] * (MAX_MESSAGES + 1)}, "chat.messages"),
        ({"messages": [{}, {"tool_calls": [{"arguments": "[1]"}]}]}, "chat.messages[1].tool_calls[0].arguments"),
        ({"messages": [{}], "tools": ["{}"] * (MAX_TOOLS + 1)}, "chat.tools"),
        ({"messages": [{}], "tools": ["{}", "not JSON"]}, "chat.tools[1]"),
        ({"messages": [{}], "tools": ['{"a": "\\ud800"}']}, "chat.tools[0]"),  # half a character
        ({"messages": [{}], "tools": ["[" * 100_000]}, "chat.tools[0]"),
        ({"messages": [{}], "template_values": "1"}, "chat.template_values"),
    ],
)
def test_what_no_template_can_read_is_refused(fields: dict[str, Any], field: str) -> None:
    chat = pb.Chat(**fields)
    with pytest.raises(InvalidRequest) as caught:
        (read_messages(chat), read_tools(chat), read_values(chat))
    assert caught.value.field == field
