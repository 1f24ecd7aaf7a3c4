"""What goes in and out of the engine: submissions and outputs, and the seams to its runner and its listeners."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from placement.errors import HeterodyneError
from placement.serving.events import EndReason, SequenceSpec
from placement.serving.step_plan import StepLoad
from workers.sampling.grammar import Grammar
from workers.sampling.sampling import SampledToken, SamplingParams
from workers.step.scoring import PromptScores
from workers.step.types import Batch, StepResult

STOPS = "this worker stops"
"""Why an engine ends that was told to, and not because of another rank."""


class Stopping(HeterodyneError):
    """The engine has left its loop; another replica, or a later time, may do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A sequence to be continued.

    Attributes:
        stop_token_ids: the sequence ends after one of these, the model's end-of-sequence ids among them.
        min_tokens: none of these is drawn before that many tokens.
        prompt_logprobs: how many of the most likely tokens to report beside each token of the prompt; None reports
            nothing.
        cache_salt: keys and values are shared among sequences of equal salt.
        grammar: what the answer must match.
        emitted_ids: tokens of the answer that another replica gave already.
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
    emitted_ids: tuple[int, ...] = ()

    @property
    def spec(self) -> SequenceSpec:
        """What of it decides when it is computed. The prompt's tokens are scored only where they are computed."""
        return SequenceSpec(
            prompt_ids=self.prompt_ids,
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            priority=self.priority,
            cache_salt=self.cache_salt,
            reuse_prefix=self.prompt_logprobs is None,
        )


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
        duration_s: time that the device took.
        load: how much it computed, of all sequences.
    """

    step: int
    duration_s: float = 0.0
    load: StepLoad = field(default_factory=StepLoad)


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
