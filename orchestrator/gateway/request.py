"""A client's GenerateRequest, checked and filled in. Pure, but for the tokenizer it is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.gateway.journal import Sampling
from orchestrator.gateway.model import MAX_TEMPERATURE, ServedModel
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_REQUEST_ID = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asked, every field within its bounds and every default filled in."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    logprobs: int | None
    priority: int


class UnknownModel(InvalidRequest):
    """The request names a model that is not served."""


def check_model(name: str, model: ServedModel) -> None:
    """Raises UnknownModel unless ``name`` is the served model's, or empty."""
    if name not in ("", model.name):
        raise UnknownModel(
            field="model",
            value=name,
            problem="is not served here",
            fix=f"Ask for {model.name!r}, or leave it empty.",
        )


def check_text(text: str, model: ServedModel, *, field: str) -> None:
    """Refuse a text that cannot fit the context before any work is spent on tokenizing it."""
    longest = model.max_context_tokens * model.max_token_bytes
    if len(text) > longest:
        raise InvalidRequest(
            field=field,
            value=f"{len(text)} characters",
            problem=f"is longer than the context of {model.max_context_tokens} tokens can be",
            fix="Send a shorter text.",
        )


def check_request(
    message: pb.GenerateRequest,
    model: ServedModel,
    *,
    prompt_ids: Sequence[int],
    new_seed: Callable[[], int],
    new_id: Callable[[], str],
) -> Request:
    """The request behind ``message``.

    Args:
        prompt_ids: the prompt's tokens, from the message or the tokenizer.
        new_seed: draws the seed of a request that names none.
        new_id: names a request that has no id.

    Raises:
        InvalidRequest: names the field, the value and the fix.
    """
    _check_prompt(prompt_ids, model)
    stop_ids = tuple(message.stop_token_ids) + (() if message.ignore_eos else model.spec.eos_token_ids)
    _check_stops(message, model)
    _bounds("priority", message.priority, -MAX_PRIORITY, MAX_PRIORITY)
    _check_id(message.request_id)
    logprobs = message.logprobs if message.HasField("logprobs") else None
    if logprobs is not None:
        _bounds("logprobs", logprobs, 0, min(MAX_LOGPROBS, model.spec.vocab_size))
    return Request(
        request_id=message.request_id or new_id(),
        prompt_ids=tuple(prompt_ids),
        sampling=_sampling(message.sampling, model, new_seed),
        max_tokens=_max_tokens(message, len(prompt_ids), model),
        stop=tuple(message.stop),
        stop_token_ids=stop_ids,
        logprobs=logprobs,
        priority=message.priority,
    )


def _check_id(request_id: str) -> None:
    if len(request_id) > MAX_REQUEST_ID:
        raise InvalidRequest(
            field="request_id",
            value=request_id,
            problem="is too long",
            fix=f"Use at most {MAX_REQUEST_ID} characters.",
        )


def _check_prompt(prompt_ids: Sequence[int], model: ServedModel) -> None:
    if not prompt_ids:
        raise InvalidRequest(
            field="prompt",
            value="",
            problem="holds no token",
            fix="Set prompt or prompt_ids to at least one token.",
        )
    # The length first: what follows then is bounded by the context, however long the list is.
    check_length(len(prompt_ids), model)
    for index, token_id in enumerate(prompt_ids):
        if token_id >= model.spec.vocab_size:
            raise InvalidRequest(
                field=f"prompt_ids.ids[{index}]",
                value=token_id,
                problem="is outside the vocabulary",
                fix=f"Use ids from 0 to {model.spec.vocab_size - 1}.",
            )


def check_length(num_prompt_tokens: int, model: ServedModel) -> None:
    """Raises InvalidRequest for a prompt that leaves no room for an answer."""
    if num_prompt_tokens >= model.max_context_tokens:
        raise InvalidRequest(
            field="prompt",
            value=f"{num_prompt_tokens} tokens",
            problem=f"leaves no room for an answer in the context of {model.max_context_tokens} tokens",
            fix=f"Send at most {model.max_context_tokens - 1} tokens.",
        )


def _check_stops(message: pb.GenerateRequest, model: ServedModel) -> None:
    for field, count, limit in (
        ("stop", len(message.stop), MAX_STOPS),
        ("stop_token_ids", len(message.stop_token_ids), MAX_STOP_IDS),
    ):
        if count > limit:
            raise InvalidRequest(field=field, value=count, problem="are too many", fix=f"Send at most {limit}.")
    for index, stop in enumerate(message.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                field=f"stop[{index}]",
                value=stop,
                problem="has an impossible length",
                fix=f"Use 1 to {MAX_STOP_CHARACTERS} characters.",
            )
    for index, token_id in enumerate(message.stop_token_ids):
        _bounds(f"stop_token_ids[{index}]", token_id, 0, model.spec.vocab_size - 1)


def _max_tokens(message: pb.GenerateRequest, num_prompt_tokens: int, model: ServedModel) -> int:
    room = model.max_context_tokens - num_prompt_tokens
    if not message.HasField("max_tokens"):
        return room
    if not 1 <= message.max_tokens <= room:
        raise InvalidRequest(
            field="max_tokens",
            value=message.max_tokens,
            problem=f"is out of range for a prompt of {num_prompt_tokens} tokens in a context of "
            f"{model.max_context_tokens}",
            fix=f"Ask for 1 to {room}, or leave it out.",
        )
    return message.max_tokens


def _sampling(message: pb.SamplingParams, model: ServedModel, new_seed: Callable[[], int]) -> Sampling:
    defaults = model.defaults
    temperature = message.temperature if message.HasField("temperature") else defaults.temperature
    top_k = message.top_k if message.HasField("top_k") else defaults.top_k
    top_p = message.top_p if message.HasField("top_p") else defaults.top_p
    _bounds("sampling.temperature", temperature, 0.0, MAX_TEMPERATURE)
    _bounds("sampling.top_k", top_k, 0, 2**31 - 1)
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequest(
            field="sampling.top_p",
            value=top_p,
            problem="is out of range",
            fix="Use a value above 0, at most 1.",
        )
    return Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=message.seed if message.HasField("seed") else new_seed(),
    )


def _bounds(field: str, value: float, low: float, high: float) -> None:
    # Written so that a NaN is out of range too.
    if not low <= value <= high:
        raise InvalidRequest(field=field, value=value, problem="is out of range", fix=f"Use {low} to {high}.")
