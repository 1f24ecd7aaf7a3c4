"""Defines what a step computes and what it returns, for the engine, its runner and the ranks that follow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kernels.attention import Run, SharedSpan
from placement.measured.exchange import Exchange
from placement.serving.kv.peers import Shipment
from workers.model.progress import LayerProgress
from workers.sampling.sampling import SampledToken, SamplerState, SamplingFailed
from workers.step.scoring import PromptScores, ScoredPrompt

RECOVER_S = 30.0
"""How long a rank may take to find somebody who holds keys and values again, before its replica is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceInput:
    """One sequence's chunk of a step.

    Attributes:
        token_ids: the ids of the chunk's tokens, as far as they are known.
        start: the position of its first token; the tokens before it are in the cache.
        runs: the slots of all tokens up to the chunk's last, as contiguous ranges in token order.
        awaits_token: whether the chunk has one more token, which the step before samples with ``sampler``.
        sampler: the state that samples after the chunk; None at ranks that follow a leader, which do not sample.
        samples: whether a token is sampled after the chunk; it is not where the prompt goes on.
        scored: the tokens of the prompt whose log-probabilities are wanted.
        ship: the keys and values that go to another replica with this step.
        sequence_id: what attention workers know the sequence by.
    """

    token_ids: Sequence[int]
    start: int
    runs: tuple[Run, ...]
    awaits_token: bool = False
    sampler: SamplerState | None = None
    samples: bool = False
    scored: ScoredPrompt | None = None
    ship: Shipment | None = None
    sequence_id: int = 0

    @property
    def num_tokens(self) -> int:
        """Counts the tokens of the chunk."""
        return len(self.token_ids) + self.awaits_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The sequences' chunks that a step computes.

    Attributes:
        sequences: the chunks.
        shared: runs of KV that several of the sequences have in common, whose members are places in ``sequences``.
        exchange: the exchange by which ranks that share sequences attend to chunks of several tokens.
        closed: transfers of keys and values that are over: the step, or a later one, may use their blocks.
        names: blocks of attention workers that the steps before this one fill, and the hash of the text of each.
        forgotten: blocks of attention workers that have lost their names; the step may write to them.
    """

    sequences: tuple[SequenceInput, ...]
    shared: tuple[SharedSpan, ...] = ()
    exchange: Exchange = Exchange.ALL_GATHER
    closed: tuple[bytes, ...] = ()
    names: tuple[tuple[int, bytes], ...] = ()
    forgotten: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Counts the tokens of all chunks."""
        return sum(sequence.num_tokens for sequence in self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The results of a step, by the place of the sequence in its batch.

    Attributes:
        tokens: the next token of each sequence; None where the sequence asked for none.
        complete: the sequences whose grammar the token completed.
        scores: the log-probabilities of prompt tokens.
        duration_s: seconds that the step took.
    """

    tokens: tuple[SampledToken | SamplingFailed | None, ...]
    complete: frozenset[int] = frozenset()
    scores: dict[int, PromptScores] = field(default_factory=dict)
    duration_s: float = 0.0


class Shipper(Protocol):
    """Sends keys and values to other replicas while a step computes them."""

    def ship(self, shipment: Shipment, runs: Sequence[Run], progress: LayerProgress) -> None:
        """Sends those of ``shipment`` layer by layer, once ``progress`` says that they are written. Never waits.

        Args:
            runs: the slots of all tokens of the sequence up to the last of them.
        """

    def close(self, transfer_id: bytes) -> None:
        """Ends a transfer, to or from this rank: nothing of it is read or written once this has returned."""


class Team(Protocol):
    """The ranks that follow this one, which leads."""

    def announce(self, batch: Batch) -> int:
        """Tells them what the next step computes. Returns its number. Called on the thread that prepares steps."""

    def begin(self, number: int, token_ids: Sequence[int]) -> None:
        """Begins a step with the tokens that it has awaited. Called on the thread that executes steps."""


class NoTeam:
    """The team of a leader that no rank follows."""

    def announce(self, batch: Batch) -> int:
        """Tells nobody."""
        return 0

    def begin(self, number: int, token_ids: Sequence[int]) -> None:
        """Tells nobody."""
