"""Reads a conversation as chat templates take it: its turns, its tools, and what else a template is told. Pure."""

import json
from typing import Any

from orchestrator.model_dir.chat import Message
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

MAX_MESSAGES = 4096
MAX_TOOLS = 128


def read_messages(chat: pb.Chat) -> list[Message]:
    """Returns the turns. Raises InvalidRequest."""
    if not chat.messages:
        raise InvalidRequest(
            field="chat.messages", value=0, problem="holds no message", fix='Send at least one, of role "user".'
        )
    if len(chat.messages) > MAX_MESSAGES:
        raise InvalidRequest(
            field="chat.messages", value=len(chat.messages), problem="are too many", fix=f"Send at most {MAX_MESSAGES}."
        )
    return [
        Message(role=message.role, content=message.content, more=_more(message, index))
        for index, message in enumerate(chat.messages)
    ]


def num_characters(chat: pb.Chat) -> int:
    """Counts the characters that a template may write out."""
    calls = [call for message in chat.messages for call in message.tool_calls]
    return (
        sum(len(message.role) + len(message.content) for message in chat.messages)
        + sum(len(call.name) + len(call.arguments) for call in calls)
        + sum(map(len, chat.tools))
    )


def _more(message: pb.ChatMessage, index: int) -> dict[str, Any]:
    """Returns what a turn has beside its words. What it has not is left out: templates ask whether it is there."""
    more: dict[str, Any] = {}
    if message.tool_calls:
        more["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": _object(
                        call.arguments or "{}", f"chat.messages[{index}].tool_calls[{number}].arguments"
                    ),
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id:
        more["tool_call_id"] = message.tool_call_id
    if message.name:
        more["name"] = message.name
    return more


def read_tools(chat: pb.Chat) -> list[dict[str, Any]]:
    """Returns the tools that the model may call. Raises InvalidRequest."""
    if len(chat.tools) > MAX_TOOLS:
        raise InvalidRequest(
            field="chat.tools", value=len(chat.tools), problem="are too many", fix=f"Send at most {MAX_TOOLS}."
        )
    return [_object(text, f"chat.tools[{index}]") for index, text in enumerate(chat.tools)]


def read_values(chat: pb.Chat) -> dict[str, Any]:
    """Returns the further variables of the template. Raises InvalidRequest."""
    return _object(chat.template_values, "chat.template_values") if chat.template_values else {}


def _object(text: str, field: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # escapes may make halves of characters, which no text may have
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest(field=field, problem="is no JSON object", fix="Send a JSON object as JSON text.")
    return value
