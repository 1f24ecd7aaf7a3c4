"""Reads a request for the next turn of a conversation. Pure."""

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from orchestrator.gateway.http.asking.body import Body, Int32, fault
from orchestrator.gateway.http.asking.common import Common, check_stream, fill, json_text
from orchestrator.gateway.http.asking.tools import CalledTool, Tool, ToolChoice, fill_tools, offered
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb


def _text(value: Any) -> str:
    """Reads what a message says: a text, or a list of parts that are all texts."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise fault("is no text and no list of parts", 'Send a text, or [{"type": "text", "text": "…"}].')
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise fault("has a part that is no text", "Send texts alone: this model reads nothing else.")
    return "\n".join(part["text"] for part in value)


Text = Annotated[str, PlainValidator(_text)]


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text = ""
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    # What clients send back of an answer, as they got it.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ChatBody(Common):
    """A request for the next turn."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    modalities: list[Literal["text"]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Of vLLM.
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def chat_message(body: ChatBody, *, request_id: str) -> pb.GenerateRequest:
    """Returns the request that ``body`` holds.

    Raises:
        InvalidRequest: names the field.
    """
    check_stream(body)
    message = pb.GenerateRequest()
    fill(message, body, default_id=request_id)
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise InvalidRequest(
                field="max_tokens",
                value=body.max_tokens,
                problem="contradicts max_completion_tokens, its newer name",
                fix="Leave it out.",
            )
        message.max_tokens = body.max_completion_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest(
            field="top_logprobs", value=body.top_logprobs, problem="needs logprobs", fix="Set logprobs to true."
        )
    if body.logprobs:
        message.logprobs = body.top_logprobs or 0
    fill_chat(message.chat, body.messages)
    fill_tools(
        message,
        offered(body.tools, body.tool_choice),
        body.tool_choice,
        several=body.parallel_tool_calls is not False,
    )
    message.chat.skip_generation_prompt = body.add_generation_prompt is False
    if body.chat_template_kwargs:
        message.chat.template_values = json_text(body.chat_template_kwargs)
    return message


def fill_chat(chat: pb.Chat, messages: list[ChatMessage]) -> None:
    """Writes the conversation into ``chat``."""
    for each in messages:
        # The newer name of a role that templates know by the older one.
        role = "system" if each.role == "developer" else each.role
        turn = chat.messages.add(
            role=role, content=each.content, tool_call_id=each.tool_call_id or "", name=each.name or ""
        )
        for call in each.tool_calls or ():
            turn.tool_calls.add(id=call.id, name=call.function.name, arguments=call.function.arguments)
