"""What goes in and out of the engine: commands, outputs, limits, and the seams to its runner and its listeners."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from placement.errors import HeterodyneError, InvalidRequest
from workers.sampling.grammar import Grammar
from workers.sampling.sampling import SampledToken, SamplingParams
from workers.step.scoring import PromptScores
from workers.step.types import Batch, StepResult


class EndReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


STOPS = "this worker stops"
"""Why an engine ends that was told to, and not because of another rank."""


class Draining(HeterodyneError):
    """The engine finishes what it has and takes nothing new."""


class Stopping(HeterodyneError):
    """The engine has left its loop; another replica, or a later time, may do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one sequence may ask of this replica."""

    max_context_tokens: int
    vocab_size: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A sequence to be continued.

    Attributes:
        stop_token_ids: the sequence ends after one of these, the model's end-of-sequence ids among them.
        min_tokens: none of these is drawn before that many tokens.
        prompt_logprobs: how many of the most likely tokens to report beside each token of the prompt; None
            reports nothing.
        cache_salt: KV is shared among sequences of equal salt.
        grammar: what the answer must match.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    priority: int = 0
    min_tokens: int = 0
    prompt_logprobs: int | None = None
    cache_salt: bytes = b""
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a step gave one sequence.

    Attributes:
        index: position of ``token`` in the answer; None with no token.
        end: set on the last output of a sequence.
        queue_s: from submission until first scheduled, with the first token.
        prefill_s: from first scheduled until the first token, with it.
        cached_tokens: prompt tokens found in the prefix cache, with the first token.
        scores: log-probabilities of a run of prompt tokens.
    """

    sequence_id: int
    index: int | None = None
    token: SampledToken | None = None
    end: EndReason | None = None
    detail: str = ""
    num_preemptions: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    cached_tokens: int | None = None
    scores: PromptScores | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What a step was.

    Attributes:
        step: counts from 1.
        num_tokens: tokens it computed, of all sequences.
        num_decodes: sequences of which it computed one token.
    """

    step: int
    duration_s: float = 0.0
    num_tokens: int = 0
    num_decodes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """Figures of the engine between two steps. ``steps`` is the progress counter of the failure detector."""

    steps: int
    num_running: int
    num_waiting: int
    free_blocks: int
    total_blocks: int
    num_preemptions: int
    pending_tokens: int
    prompt_tokens: int
    output_tokens: int
    prefix_queries: int
    prefix_hits: int


class Sink(Protocol):
    """Who asked for a sequence. Called on the engine's thread, so it must only hand over and return.

    Once the engine has left its loop, it is called on the thread that submits.
    """

    def step(self, stats: StepStats, outputs: Seq[Output]) -> None:
        """A step that computed sequences of this sink, and what it gave them; a prefill that goes on gives nothing."""

    def refused(self, sequence_id: int, error: HeterodyneError) -> None:
        """The submission was not taken."""


class Runner(Protocol):
    """Computes batches."""

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """Lays a batch out, while another may execute; calling the result executes it.

        Results are called on one thread, in the order of preparation.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    sink: Sink
    sequence_id: int
    submission: Submission
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    sink: Sink
    sequence_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    sink: Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    pass


Command = Submit | Cancel | Abandon | Stop | StepDone


def repeated(sequence_id: int) -> InvalidRequest:
    """The refusal of a sequence id that is already in use on its stream."""
    return InvalidRequest(
        field="sequence_id",
        value=sequence_id,
        problem="is already in use",
        fix="Use each id once in a stream.",
    )


def check_submission(submission: Submission, limits: Limits) -> None:
    """Refuse what this replica cannot compute.

    Raises:
        InvalidRequest: an empty prompt, a token id outside the vocabulary, no token asked for, or a prompt and
            answer longer together than the context.
    """
    num_prompt = len(submission.prompt_ids)
    if not num_prompt:
        raise InvalidRequest(field="prompt", value="", problem="is empty", fix="Send at least one token.")
    for token_id in (min(submission.prompt_ids), max(submission.prompt_ids)):
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidRequest(
                field="prompt_ids",
                value=token_id,
                problem="holds an id outside the vocabulary",
                fix=f"Use ids from 0 to {limits.vocab_size - 1}.",
            )
    room = limits.max_context_tokens - num_prompt
    if not 1 <= submission.max_tokens <= room:
        raise InvalidRequest(
            field="max_tokens",
            value=submission.max_tokens,
            problem=f"does not fit a prompt of {num_prompt} tokens in a context of {limits.max_context_tokens}",
            fix=f"Ask for 1 to {room} tokens." if room >= 1 else "Send a shorter prompt.",
        )
