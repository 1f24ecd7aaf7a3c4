"""Reads a request for completions, the API of text that goes on. Pure."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from orchestrator.gateway.http.asking.body import Int32, fault
from orchestrator.gateway.http.asking.common import Common, check_stream, fill
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16  # as in the OpenAI API

Prompt = str | Sequence[int]


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """Reads a text, token ids, or a list of either."""
    if isinstance(value, str) or _are_ids(value):
        return (value,)
    if not isinstance(value, list) or not value:
        raise fault("is no text and no list", "Send a text, a list of token ids, or a list of either.")
    if len(value) > MAX_PROMPTS:
        raise fault(f"holds {len(value)} prompts", f"Send at most {MAX_PROMPTS} in one request.")
    if not all(isinstance(each, str) for each in value) and not all(_are_ids(each) for each in value):
        raise fault(
            "is a list of other things than texts or lists of token ids",
            "Send texts alone, or lists of whole numbers from 0 alone.",
        )
    return tuple(value)


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 2**32 for each in value)
    )


class CompletionBody(Common):
    """A request for completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts)]
    echo: bool | None = None
    logprobs: Int32 | None = None
    best_of: Int32 | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None


def completion_messages(body: CompletionBody, *, request_id: str) -> tuple[pb.GenerateRequest, ...]:
    """Returns a request for each prompt.

    Raises:
        InvalidRequest: names the field.
    """
    check_stream(body)
    if body.best_of is not None and body.best_of != body.num_choices:
        raise InvalidRequest(
            field="best_of", value=body.best_of, problem="is not n", fix="Leave it out: all choices are returned."
        )
    return tuple(_message(body, index, request_id) for index in range(len(body.prompt)))


def _message(body: CompletionBody, index: int, request_id: str) -> pb.GenerateRequest:
    prompt = body.prompt[index]
    message = pb.GenerateRequest(echo=bool(body.echo), logprobs=body.logprobs)
    fill(message, body, default_id=request_id)
    if len(body.prompt) > 1:
        message.request_id = f"{message.request_id}-{index}"
    if isinstance(prompt, str):
        message.prompt = prompt
    else:
        message.prompt_ids.ids.extend(prompt)
    if body.max_tokens is None:
        message.max_tokens = DEFAULT_MAX_TOKENS
    return message
