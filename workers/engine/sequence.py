"""Holds a sequence as the engine computes it: who asked, how it is sampled, and what the next step computes of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.model.part import Span
from placement.serving.kv.peers import Shipment
from placement.serving.kv.runs import TableRuns
from placement.serving.step_plan import Chunk
from workers.engine.types import KvTransfer, Shipping, Sink, Submission
from workers.sampling.sampling import SamplerState
from workers.step.scoring import PromptScores, ScoredPrompt
from workers.step.types import SequenceInput


@dataclass(slots=True, kw_only=True, eq=False)
class EngineSequence:
    """A sequence in the engine. The core decides what happens to it next.

    Attributes:
        sink: receives the outputs of the sequence.
        sequence_id: the id that the sink uses for it.
        sampler: chooses its tokens; only the thread that executes steps uses it.
        runs: its block table as ranges of KV slots.
        num_scored: how many prompt tokens have log-probabilities that are known or on their way; the first token, which
            has none, counts.
        num_scored_told: how many of them were told to the sink.
        num_shipped: the leading prompt tokens whose keys and values the other replica has, or is sent.
        transfer: what became of those that another replica was to send; None where none was.
    """

    sink: Sink
    sequence_id: int
    submission: Submission
    sampler: SamplerState
    runs: TableRuns
    num_scored: int = 1
    num_scored_told: int = 1
    num_shipped: int = 0
    transfer: KvTransfer | None = None

    def take_chunk(self, chunk: Chunk, token_ids: Sequence[int], table: list[int]) -> SequenceInput:
        """Returns what a step computes of the sequence, and counts the prompt tokens that it scores.

        Args:
            token_ids: the tokens of the chunk, as far as they are known.
            table: the sequence's KV blocks.
        """
        stop = chunk.start + chunk.num_tokens
        return SequenceInput(
            token_ids=token_ids,
            start=chunk.start,
            runs=self.runs.first(table, stop),
            awaits_token=len(token_ids) < chunk.num_tokens,
            sampler=self.sampler,
            samples=chunk.samples,
            scored=None if self.submission.prompt_logprobs is None else self._scored(stop),
            ship=None if self.submission.ship is None else self._shipment(self.submission.ship, stop),
            sequence_id=chunk.sequence_id,
        )

    def tell_scores(self, scores: PromptScores) -> None:
        """Notes that the sink is told of scores."""
        self.num_scored_told = scores.first_index + len(scores.top)

    def roll_back(self, answer: Sequence[int]) -> None:
        """Forgets what steps did that are lost.

        Args:
            answer: the tokens of the answer that are known. A step that sampled and was lost has sampled in vain.
        """
        self.num_scored = self.num_scored_told
        if self.sampler.num_tokens != len(answer):
            self.sampler = _sampler(self.submission, answer)

    def _shipment(self, ship: Shipping, stop: int) -> Shipment | None:
        """Returns what goes to another replica with a chunk up to ``stop``: what is known by then and was not sent."""
        is_last = stop >= len(self.submission.prompt_ids)
        start = max(self.num_shipped, ship.first_token)
        stop = min(stop, len(self.submission.prompt_ids))
        if stop <= start or not (ship.by_layer or is_last):
            return None
        self.num_shipped = stop
        return Shipment(transfer_id=ship.transfer_id, tokens=Span(start, stop), by_layer=ship.by_layer)

    def _scored(self, stop: int) -> ScoredPrompt | None:
        """Returns the prompt tokens that a chunk up to ``stop`` predicts, without those scored before."""
        prompt_ids, num_top = self.submission.prompt_ids, self.submission.prompt_logprobs
        first, last = self.num_scored, min(stop + 1, len(prompt_ids))
        if num_top is None or first >= last:
            return None
        self.num_scored = last
        return ScoredPrompt(first_index=first, token_ids=prompt_ids[first:last], num_top=num_top)


def begin(sink: Sink, sequence_id: int, submission: Submission, block_size: int) -> EngineSequence:
    """Makes the engine's sequence of a submission."""
    return EngineSequence(
        sink=sink,
        sequence_id=sequence_id,
        submission=submission,
        sampler=_sampler(submission, submission.emitted_ids),
        runs=TableRuns(block_size),
    )


def _sampler(submission: Submission, answer: Sequence[int]) -> SamplerState:
    """Makes what chooses the tokens that follow the answer so far."""
    return SamplerState(
        submission.sampling,
        submission.prompt_ids,
        stop_token_ids=submission.stop_token_ids,
        min_tokens=submission.min_tokens,
        emitted_ids=answer,
        grammar=None if submission.grammar is None else submission.grammar.start(),
    )
