"""Defines what goes into the engine and out of it: submissions, outputs, and the protocols of its runner and sinks."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from placement.errors import HeterodyneError
from placement.serving.events import EndReason, Receive, SequenceSpec
from placement.serving.step_plan import StepLoad
from workers.sampling.grammar import Grammar
from workers.sampling.sampling import SampledToken, SamplingParams
from workers.step.scoring import PromptScores
from workers.step.types import Batch, StepResult

STOPS = "this worker stops"
"""The cause that an engine gives where it was told to stop, and no other rank is to blame."""


class Stopping(HeterodyneError):
    """The engine has left its loop. The client may try another replica, or try later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSource:
    """Another replica, which computes the keys and values of a prompt.

    Attributes:
        replica: its name.
        epoch: its incarnation.
        address: where its leader is called.
    """

    replica: str
    epoch: int
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipping:
    """The way in which the keys and values of a prompt go to another replica.

    Attributes:
        transfer_id: names the transfer.
        first_token: the other replica has those of the tokens before this one.
        by_layer: whether each layer is sent once a step has computed it, and not all at the end.
    """

    transfer_id: bytes
    first_token: int
    by_layer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransfer:
    """Tells what became of keys and values that another replica was to compute and send. Times are in seconds.

    Attributes:
        num_tokens: tokens whose keys and values came; 0 where the prompt is computed here after all.
        num_bytes: bytes that came.
        queue_s: time at the other replica until a step first computed the prompt.
        prefill_s: time from then until all of it was computed.
        exposed_s: time from then until the last byte was here.
        cached_tokens: tokens that the other replica found in its prefix cache.
        by_layer: whether layers were sent as they were computed.
        problem: why none came; empty where they did.
    """

    num_tokens: int = 0
    num_bytes: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    exposed_s: float = 0.0
    cached_tokens: int = 0
    by_layer: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A sequence that the engine is asked to continue.

    Attributes:
        stop_token_ids: the sequence ends after one of these, the model's end-of-sequence ids among them.
        min_tokens: how many tokens the answer has before one of ``stop_token_ids`` may be drawn.
        prompt_logprobs: how many of the most likely tokens to report beside each token of the prompt; None reports
            nothing.
        cache_salt: keys and values are shared among sequences of equal salt.
        grammar: what the answer must match.
        emitted_ids: tokens of the answer that another replica has given already; recovery sends them.
        prefill: the replica that computes the prompt; None: this one does.
        ship: how the keys and values of the prompt go to another replica; None: they do not.
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
    prefill: PrefillSource | None = None
    ship: Shipping | None = None

    @property
    def spec(self) -> SequenceSpec:
        """Returns what the core needs. A prompt to be scored reuses no prefix: only computed tokens are scored."""
        return SequenceSpec(
            prompt_ids=self.prompt_ids,
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            priority=self.priority,
            cache_salt=self.cache_salt,
            reuse_prefix=self.prompt_logprobs is None,
            awaits_kv=self.prefill is not None and self.prompt_logprobs is None,
            ship_to=None if self.ship is None else self.ship.transfer_id.hex(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A part of one sequence's answer, as the sequence's sink receives it.

    Attributes:
        index: position of ``token`` in the answer; None where there is no token.
        end: why the sequence ends; set on its last output alone.
        grammar_problem: what is wrong with the grammar, where nothing else made the sequence fail.
        queue_s: time from submission until the sequence is first scheduled; set with the first token.
        prefill_s: time from then until the first token; set with the first token.
        cached_tokens: prompt tokens found in the prefix cache; set with the first token.
        scores: log-probabilities of a run of prompt tokens.
        transfer: what became of the keys and values that another replica was to send; set with the first token.
    """

    sequence_id: int
    index: int | None = None
    token: SampledToken | None = None
    end: EndReason | None = None
    detail: str = ""
    grammar_problem: str | None = None
    num_preemptions: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    cached_tokens: int | None = None
    scores: PromptScores | None = None
    transfer: KvTransfer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """The number, time and size of a step.

    Attributes:
        step: its number, from 1.
        duration_s: the time that the device took.
        load: how much it computed for all sequences.
    """

    step: int
    duration_s: float = 0.0
    load: StepLoad = field(default_factory=StepLoad)


class Sink(Protocol):
    """Receives the answers to what it submits. It must only hand them over and return: the engine's thread calls it.

    Once the engine has left its loop, the thread that submits calls it.
    """

    def step(self, stats: StepStats, outputs: Seq[Output]) -> None:
        """Receives what a step gave the sequences of this sink; ``outputs`` is empty while only prefills go on."""

    def refused(self, sequence_id: int, error: HeterodyneError) -> None:
        """Learns that the engine does not take a submission, and why."""


class Runner(Protocol):
    """Computes batches."""

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        """Lays a batch out, while another may execute, and returns a function that executes it.

        The engine calls these functions in the order in which they were prepared.
        """


@runtime_checkable
class Recovering(Protocol):
    """A runner that can go on after a step has raised :class:`workers.transport.errors.KvGone`."""

    def recover(self) -> None:
        """Has somebody hold keys and values again, all of which are lost. No step is on its way.

        The engine calls it on the thread that executes steps. It takes at most RECOVER_S.

        Raises:
            HeterodyneError: nobody was found; the replica is lost.
        """


class KvExchange(Protocol):
    """Exchanges keys and values with other replicas. The engine's thread calls it, and it must only hand over."""

    def receive(self, command: Receive, submission: Submission) -> None:
        """Has the keys and values of a prompt sent here. :meth:`workers.engine.engine.Engine.kv_came` tells the end."""

    def revoke(self, hold_id: int) -> None:
        """Stops what :meth:`receive` has begun; its end is told all the same."""

    def close(self, transfer_id: bytes) -> None:
        """Ends a transfer: at this rank nothing of it is read or written from now on, at the others before they compute
        a step, or take part in a transfer, of which they are told later.
        """
