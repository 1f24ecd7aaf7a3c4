"""What a step computes and what it gives, as the engine, its runner and the ranks that follow see it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kernels.attention import Run, SharedSpan
from placement.measured.exchange import Exchange
from workers.sampling.sampling import SampledToken, SamplerState, SamplingFailed
from workers.step.scoring import PromptScores, ScoredPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceInput:
    """One sequence's chunk of a step.

    Attributes:
        token_ids: ids of the chunk, as far as they are known.
        start: position of its first token; the tokens before it are in the cache.
        runs: slots of all tokens up to the chunk's last, as contiguous ranges in token order.
        awaits_token: the chunk has one more token, the one that the step before samples with ``sampler``.
        sampler: how to sample after the chunk; None at ranks that follow a leader, which do not.
        samples: whether to; the prompt may go on.
        scored: the prompt's tokens whose log-probabilities are wanted.
    """

    token_ids: Sequence[int]
    start: int
    runs: tuple[Run, ...]
    awaits_token: bool = False
    sampler: SamplerState | None = None
    samples: bool = False
    scored: ScoredPrompt | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the chunk."""
        return len(self.token_ids) + self.awaits_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a step computes.

    Attributes:
        shared: runs of KV that several of the sequences have in common, by their place in ``sequences``.
        exchange: how ranks that share sequences attend to chunks of several tokens.
    """

    sequences: tuple[SequenceInput, ...]
    shared: tuple[SharedSpan, ...] = ()
    exchange: Exchange = Exchange.ALL_GATHER

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(sequence.num_tokens for sequence in self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave, by the place of the sequence in its batch.

    Attributes:
        tokens: the next token of each sequence that asked for one.
        complete: sequences whose grammar the token completed.
        scores: the prompt tokens that were scored.
        duration_s: time that the device took.
    """

    tokens: tuple[SampledToken | SamplingFailed | None, ...]
    complete: frozenset[int] = frozenset()
    scores: dict[int, PromptScores] = field(default_factory=dict)
    duration_s: float = 0.0


class Team(Protocol):
    """The ranks that follow this one, which leads."""

    def announce(self, batch: Batch) -> int:
        """Tells them what the next step computes; the step's number. On the thread that prepares steps."""

    def begin(self, number: int, token_ids: Sequence[int]) -> None:
        """Begins a step, with the tokens that it has awaited. On the thread that executes steps."""


class NoTeam:
    """Nobody follows."""

    def announce(self, batch: Batch) -> int:
        """There is nobody to tell."""
        return 0

    def begin(self, number: int, token_ids: Sequence[int]) -> None:
        """There is nobody to tell."""
