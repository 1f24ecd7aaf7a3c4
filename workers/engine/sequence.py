"""Holds a sequence as the engine computes it: who asked, how it is sampled, and what the next step computes of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.serving.kv.runs import TableRuns
from placement.serving.step_plan import Chunk
from workers.engine.types import Sink, Submission
from workers.sampling.sampling import SamplerState
from workers.step.scoring import ScoredPrompt
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
    """

    sink: Sink
    sequence_id: int
    submission: Submission
    sampler: SamplerState
    runs: TableRuns
    num_scored: int = 1

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
        )

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
        sampler=SamplerState(
            submission.sampling,
            submission.prompt_ids,
            stop_token_ids=submission.stop_token_ids,
            min_tokens=submission.min_tokens,
            emitted_ids=submission.emitted_ids,
            grammar=None if submission.grammar is None else submission.grammar.start(),
        ),
        runs=TableRuns(block_size),
    )
