"""Checks whether a replica can compute a request, and makes the errors of those that it refuses."""

from dataclasses import dataclass

from placement.errors import HeterodyneError, InvalidRequest
from placement.serving.events import SequenceSpec


class Draining(HeterodyneError):
    """The replica finishes the sequences that it has and takes no new ones."""


def draining() -> Draining:
    """Returns the error by which a replica that drains refuses a sequence."""
    return Draining("this replica is draining and takes no new sequences")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The bounds of what one sequence may ask of a replica."""

    max_context_tokens: int
    vocab_size: int
    block_size: int


def repeated(sequence_id: int) -> InvalidRequest:
    """Returns the error that refuses a sequence id which is already in use."""
    return InvalidRequest(
        field="sequence_id",
        value=sequence_id,
        problem="is already in use",
        fix="Use each id once in a stream.",
    )


def check_spec(spec: SequenceSpec, limits: Limits, *, num_emitted: int = 0) -> None:
    """Refuses a sequence that a replica cannot compute.

    Raises:
        InvalidRequest: an empty prompt, a token id outside the vocabulary, no token asked for, a prompt and answer
            longer together than the context, an answer that was complete already, or a sequence that goes elsewhere
            after more than its first token.
    """
    num_prompt = len(spec.prompt_ids)
    if not num_prompt:
        raise InvalidRequest(field="prompt", value="", problem="is empty", fix="Send at least one token.")
    for token_id in (min(spec.prompt_ids), max(spec.prompt_ids)):
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidRequest(
                field="prompt_ids",
                value=token_id,
                problem="holds an id outside the vocabulary",
                fix=f"Use ids from 0 to {limits.vocab_size - 1}.",
            )
    room = limits.max_context_tokens - num_prompt
    if not 1 <= spec.max_tokens <= room:
        raise InvalidRequest(
            field="max_tokens",
            value=spec.max_tokens,
            problem=f"does not fit a prompt of {num_prompt} tokens in a context of {limits.max_context_tokens}",
            fix=f"Ask for 1 to {room} tokens." if room >= 1 else "Send a shorter prompt.",
        )
    if num_emitted >= spec.max_tokens:
        problem = f"leaves nothing to generate of {spec.max_tokens} tokens"
        raise InvalidRequest(field="emitted_ids", value=num_emitted, problem=problem, fix="Ask for more tokens.")
    if spec.ship_to is not None and (spec.max_tokens != 1 or spec.awaits_kv):
        problem, fix = "is for sequences whose prompt is computed here, and one token", "Ask for one token."
        raise InvalidRequest(field="ship_to", value=spec.ship_to, problem=problem, fix=fix)
