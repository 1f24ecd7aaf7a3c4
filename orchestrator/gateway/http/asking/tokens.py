"""Reads requests to make tokens of a text and back, in the forms of vLLM. Pure."""

from typing import Annotated, Any

from pydantic import Field

from orchestrator.gateway.http.asking.body import Body, TokenId
from orchestrator.gateway.http.asking.chat import ChatMessage, fill_chat
from orchestrator.gateway.http.asking.common import json_text
from orchestrator.gateway.http.asking.tools import Tool
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb


class TokenizeBody(Body):
    """A text, or a conversation, whose tokens are asked for."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body):
    """Tokens whose text is asked for."""

    model: str | None = None
    tokens: list[TokenId]


def conversation(body: TokenizeBody) -> pb.Chat | None:
    """Returns the conversation that is to be tokenized; None where it is a text.

    Raises:
        InvalidRequest: there is neither or both, or a field that has no meaning with it.
    """
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest(field="prompt", problem="or messages is required, alone", fix="Send one of them.")
    if body.messages is None:
        return None
    if body.add_special_tokens:
        raise InvalidRequest(
            field="add_special_tokens",
            problem="is not for messages: the chat template writes the special tokens out",
            fix="Leave it out.",
        )
    chat = pb.Chat(skip_generation_prompt=body.add_generation_prompt is False)
    fill_chat(chat, body.messages)
    chat.tools.extend(json_text(tool.model_dump(exclude_none=True)) for tool in body.tools or ())
    if body.chat_template_kwargs:
        chat.template_values = json_text(body.chat_template_kwargs)
    return chat
