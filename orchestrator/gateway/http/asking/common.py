"""Reads what requests for completions and for chat have in common: how tokens are chosen, and how they are sent. Pure.

Beside the fields of the OpenAI API there are those that vLLM adds, under vLLM's names.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from orchestrator.gateway.http.asking.body import Body, Int32, TokenId, fault
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb

_NUM_SEEDS = 2**64
_SPECIAL = frozenset(r"\.+*?()|[]{}^$#&-~")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    """Reads the keys of a JSON object, which are texts, as token ids."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise fault("has a key that is no token id", 'Use whole numbers as keys, such as {"50256": -100}.')
    return {int(key): bias for key, bias in value.items()}


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Body):
    """A JSON Schema that the answer is held to."""

    name: Annotated[str, Field(max_length=128)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """Says what the answer is held to, in vLLM's form: by one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    grammar: str | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1024)] | None = None


class Common(Body):
    """The fields that both kinds of request have. None is the same as a field that is left out."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int32 | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=_NUM_SEEDS)] | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_listed)] = None
    max_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_biases)] = None
    response_format: ResponseFormat | None = None
    # Notes of the client's own, which change nothing.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Of vLLM.
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int32 | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    priority: Int32 | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None

    @property
    def num_choices(self) -> int:
        """Returns how many choices each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """Returns whether the last chunk of a stream says what was used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def check_stream(body: Common) -> None:
    """Raises InvalidRequest for options of a stream where there is none."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            field="stream_options", problem="is for streams alone", fix="Set stream to true, or leave it out."
        )


def fill(message: pb.GenerateRequest, body: Common, *, default_id: str) -> None:
    """Writes into ``message`` what ``body`` says, but for the prompt and the log-probabilities.

    Args:
        default_id: the id of a request that names none.
    """
    message.model = body.model or ""
    message.request_id = body.request_id or default_id
    if body.max_tokens is not None:
        message.max_tokens = body.max_tokens
    if body.n is not None:
        message.num_choices = body.n
    message.stop.extend(body.stop or ())
    message.stop_token_ids.extend(body.stop_token_ids or ())
    message.ignore_eos = bool(body.ignore_eos)
    message.priority = body.priority or 0
    message.cache_salt = body.cache_salt or ""
    message.min_tokens = body.min_tokens or 0
    _fill_sampling(message.sampling, body)
    if body.response_format is not None:
        _fill_format(message.structured_output, body.response_format)
    if body.structured_outputs is not None:
        if message.structured_output.WhichOneof("format") is not None:
            raise InvalidRequest(
                field="structured_outputs", problem="is there beside response_format", fix="Send one of them."
            )
        _fill_structured(message.structured_output, body.structured_outputs)


def _fill_sampling(sampling: pb.SamplingParams, body: Common) -> None:
    values: Mapping[str, float | None] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        # vLLM writes -1 for all tokens.
        "top_k": 0 if body.top_k == -1 else body.top_k,
        "seed": None if body.seed is None else body.seed % _NUM_SEEDS,
    }
    for name, value in values.items():
        if value is not None:
            setattr(sampling, name, value)
    for token_id, bias in (body.logit_bias or {}).items():
        sampling.logit_bias.add(token_id=token_id, bias=bias)


def _fill_format(structured: pb.StructuredOutput, form: ResponseFormat) -> None:
    schema = form.json_schema
    if (form.type == "json_schema") != (schema is not None):
        problem = "is required" if schema is None else f"has no meaning where the type is {form.type}"
        raise InvalidRequest(
            field="response_format.json_schema", problem=problem, fix="Send it where the type is json_schema, alone."
        )
    if form.type == "json_object":
        structured.json_schema = '{"type":"object"}'
    elif schema is not None:
        structured.json_schema = json_text(schema.schema_)


def _fill_structured(structured: pb.StructuredOutput, form: StructuredOutputs) -> None:
    if sum(value is not None for value in (form.json_, form.regex, form.grammar, form.choice)) != 1:
        raise InvalidRequest(
            field="structured_outputs",
            problem="holds none or several of json, regex, grammar and choice",
            fix="Send one of them.",
        )
    if form.json_ is not None:
        structured.json_schema = form.json_ if isinstance(form.json_, str) else json_text(form.json_)
    elif form.regex is not None:
        structured.regex = form.regex
    elif form.grammar is not None:
        structured.grammar = form.grammar
    else:
        structured.regex = "|".join(_literal(choice) for choice in form.choice or ())


def _literal(text: str) -> str:
    """Returns the regular expression, in the syntax of Rust's regex, that matches ``text`` alone."""
    return "".join(f"\\{character}" if character in _SPECIAL else character for character in text)


def json_text(value: object) -> str:
    """Returns ``value`` as compact JSON text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
