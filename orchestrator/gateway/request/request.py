"""Checks a client's GenerateRequest and fills in its defaults. Pure."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.gateway.errors import ContextExceeded, UnknownModel
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.sampling import check_bounds, check_sampling
from orchestrator.gateway.request.shown import shown
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_REQUEST_ID = 128
MAX_CHOICES = 64
MAX_CACHE_SALT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Holds what a user asked, every field within its bounds and every default filled in.

    Attributes:
        sampling: how tokens are chosen, every default filled in; nobody changes it.
        seed: the seed of the first choice.
        max_tokens: the most tokens of each choice; 0 with ``echo`` only.
        num_choices: how many continuations are drawn.
        echo: whether the prompt's tokens are returned.
        cache_salt: a digest of the client's salt; empty where it gave none.
        grammar: what each choice must match.
        shown_tokens: the special tokens that the answer's text does not leave out, with their texts.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: worker_pb2.Sampling
    seed: int
    max_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    logprobs: int | None
    priority: int
    min_tokens: int = 0
    num_choices: int = 1
    echo: bool = False
    cache_salt: bytes = b""
    grammar: worker_pb2.Grammar | None = None
    shown_tokens: Mapping[int, str] = dataclasses.field(default_factory=dict)


def check_model(name: str, model: ServedModel) -> None:
    """Raises UnknownModel unless ``name`` is the served model's or empty."""
    if name not in ("", model.name):
        raise UnknownModel(
            field="model",
            value=shown(name),
            problem="is not served here",
            fix=f"Ask for {model.name!r}, or leave it empty.",
        )


def check_text(text: str, model: ServedModel, *, field: str) -> None:
    """Refuses a text that cannot fit the context before any work is spent on tokenizing it."""
    check_size(len(text), model, field=field)


def check_size(num_characters: int, model: ServedModel, *, field: str) -> None:
    """Raises ContextExceeded for more characters than the tokens of a whole context can stand for."""
    if num_characters > model.max_context_tokens * model.max_token_bytes:
        raise ContextExceeded(
            field=field,
            value=f"{num_characters} characters",
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
    """Returns the request that ``message`` holds, but for its grammar.

    Args:
        prompt_ids: the prompt's tokens, from the message or the tokenizer.
        new_seed: draws the seed of a request that names none.
        new_id: names a request that has no id.

    Raises:
        InvalidRequest: names the field, the value and the fix.
    """
    _check_prompt(prompt_ids, model)
    _check_stops(message, model)
    _check_rest(message, model)
    max_tokens = _max_tokens(message, len(prompt_ids), model)
    check_bounds("min_tokens", message.min_tokens, 0, max_tokens)
    _check_together(message, max_tokens)
    return Request(
        request_id=message.request_id or new_id(),
        prompt_ids=tuple(prompt_ids),
        sampling=check_sampling(message.sampling, model),
        seed=message.sampling.seed if message.sampling.HasField("seed") else new_seed(),
        max_tokens=max_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids) + (() if message.ignore_eos else model.spec.eos_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        priority=message.priority,
        min_tokens=message.min_tokens,
        num_choices=message.num_choices if message.HasField("num_choices") else 1,
        echo=message.echo,
        cache_salt=hashlib.sha256(message.cache_salt.encode()).digest() if message.cache_salt else b"",
    )


def _check_rest(message: pb.GenerateRequest, model: ServedModel) -> None:
    check_bounds("priority", message.priority, -MAX_PRIORITY, MAX_PRIORITY)
    if message.HasField("logprobs"):
        check_bounds("logprobs", message.logprobs, 0, min(MAX_LOGPROBS, model.spec.vocab_size))
    if message.HasField("num_choices"):
        check_bounds("num_choices", message.num_choices, 1, MAX_CHOICES)
    _check_length_of("request_id", message.request_id, MAX_REQUEST_ID)
    _check_length_of("cache_salt", message.cache_salt, MAX_CACHE_SALT)
    if not message.request_id.isprintable():
        raise InvalidRequest(
            field="request_id",
            value=shown(message.request_id),
            problem="holds characters that cannot be printed",
            fix="Use printable characters only.",
        )


def _check_together(message: pb.GenerateRequest, max_tokens: int) -> None:
    """Refuses fields that are allowed alone and have no meaning together."""
    if message.min_tokens and message.structured_output.WhichOneof("format") is not None:
        # A grammar may allow nothing but the end, which min_tokens forbids.
        raise InvalidRequest(
            field="min_tokens",
            value=message.min_tokens,
            problem="cannot be held together with structured_output, which says where the answer ends",
            fix="Leave one of them out.",
        )
    if not max_tokens and message.num_choices > 1:
        raise InvalidRequest(
            field="num_choices",
            value=message.num_choices,
            problem="choices without tokens are all alike",
            fix="Ask for one, or for more than 0 max_tokens.",
        )


def _check_length_of(field: str, value: str, limit: int) -> None:
    if len(value) > limit:
        raise InvalidRequest(
            field=field, value=f"{len(value)} characters", problem="is too long", fix=f"Use at most {limit}."
        )


def _check_prompt(prompt_ids: Sequence[int], model: ServedModel) -> None:
    if not prompt_ids:
        raise InvalidRequest(
            field="prompt",
            value="",
            problem="holds no token",
            fix="Set prompt, prompt_ids or chat to at least one token.",
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
    """Raises ContextExceeded for a prompt that leaves no room for an answer."""
    if num_prompt_tokens >= model.max_context_tokens:
        raise ContextExceeded(
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
                value=shown(stop),
                problem="has an impossible length",
                fix=f"Use 1 to {MAX_STOP_CHARACTERS} characters.",
            )
    for index, token_id in enumerate(message.stop_token_ids):
        check_bounds(f"stop_token_ids[{index}]", token_id, 0, model.spec.vocab_size - 1)


def _max_tokens(message: pb.GenerateRequest, num_prompt_tokens: int, model: ServedModel) -> int:
    room = model.max_context_tokens - num_prompt_tokens
    if not message.HasField("max_tokens"):
        return room
    least = 0 if message.echo else 1
    if not least <= message.max_tokens <= room:
        raise ContextExceeded(
            field="max_tokens",
            value=message.max_tokens,
            problem=f"is out of range for a prompt of {num_prompt_tokens} tokens in a context of "
            f"{model.max_context_tokens}",
            fix=f"Ask for {least} to {room}, or leave it out.",
        )
    return message.max_tokens


def check_ids(token_ids: Sequence[int], model: ServedModel) -> None:
    """Raises InvalidRequest for ids that are too many to make a text of, or outside the vocabulary."""
    if len(token_ids) > model.max_context_tokens:
        raise InvalidRequest(
            field="ids",
            value=f"{len(token_ids)} ids",
            problem="are more than the context holds",
            fix=f"Send at most {model.max_context_tokens} at a time.",
        )
    for index, token_id in enumerate(token_ids):
        if token_id >= model.spec.vocab_size:
            raise InvalidRequest(
                field=f"ids[{index}]",
                value=token_id,
                problem="is outside the vocabulary",
                fix=f"Use ids from 0 to {model.spec.vocab_size - 1}.",
            )
