"""A sequence inside the engine: its token ids, what a step computes of it, and what it makes of a step's result."""

from dataclasses import dataclass

from placement.serving.prefix import chain_hashes
from placement.serving.runs import TableRuns
from placement.serving.sequence import Sequence
from placement.serving.step_plan import Chunk
from workers.engine.types import EndReason, Output, Sink, Submission, Submit
from workers.sampling.sampling import SampledToken, SamplerState
from workers.step.scoring import ScoredPrompt
from workers.step.types import SequenceInput


@dataclass(slots=True, kw_only=True)
class Work:
    """A sequence in the engine: what was asked, its token ids so far, and when things happened (monotonic s).

    Attributes:
        token_ids: prompt and answer, as far as the answer is known: ``sequence`` counts the token of the step that
            executes, too.
        sampler: used by the thread that executes.
        num_scored: prompt tokens whose log-probabilities are known or on their way, the first among them.
    """

    sink: Sink
    sequence_id: int
    submission: Submission
    sequence: Sequence
    token_ids: list[int]
    sampler: SamplerState
    runs: TableRuns
    submitted_s: float
    scheduled_s: float | None = None
    num_scored: int = 1

    @property
    def num_outputs(self) -> int:
        """Tokens of the answer that are known."""
        return len(self.token_ids) - self.sequence.num_prompt_tokens

    def take_chunk(self, chunk: Chunk) -> SequenceInput:
        """What the next step computes of the sequence. Prompt tokens are scored once, even if computed again."""
        stop = chunk.start + chunk.num_tokens
        assert len(self.token_ids) >= stop - 1, "only the newest token can be unknown"
        return SequenceInput(
            token_ids=self.token_ids[chunk.start : stop],
            start=chunk.start,
            runs=self.runs.first(self.sequence.block_table, stop),
            awaits_token=stop > len(self.token_ids),
            sampler=self.sampler,
            samples=chunk.samples,
            scored=self._scored(stop),
        )

    def _scored(self, stop: int) -> ScoredPrompt | None:
        """The prompt tokens that follow the chunk's, as far as they have not been scored."""
        num_top = self.submission.prompt_logprobs
        first, last = self.num_scored, min(stop + 1, self.sequence.num_prompt_tokens)
        if num_top is None or first >= last:
            return None
        self.num_scored = last
        return ScoredPrompt(first_index=first, token_ids=self.token_ids[first:last], num_top=num_top)

    def append(self, token: SampledToken, *, is_complete: bool, now: float) -> Output:
        """Takes a token into the answer; says whether it was the last.

        Args:
            is_complete: the token completed what the grammar allows.
            now: monotonic s.
        """
        assert self.scheduled_s is not None, self
        index = self.num_outputs
        self.token_ids.append(token.token_id)
        end: EndReason | None = None
        if is_complete or token.token_id in self.submission.stop_token_ids:
            end = EndReason.STOP
        elif index + 1 == self.submission.max_tokens:
            end = EndReason.LENGTH
        is_first = index == 0
        return Output(
            sequence_id=self.sequence_id,
            index=index,
            token=token,
            end=end,
            num_preemptions=self.sequence.num_preemptions,
            queue_s=self.scheduled_s - self.submitted_s if is_first else None,
            prefill_s=now - self.scheduled_s if is_first else None,
            cached_tokens=self.sequence.num_cached_tokens if is_first else None,
        )

    def extend_hashes(self, block_size: int) -> None:
        """Names the blocks that are full since, so that later prompts may find them."""
        hashes = self.sequence.block_hashes
        if len(self.token_ids) // block_size > len(hashes):
            salt = self.submission.cache_salt
            self.sequence.block_hashes = chain_hashes(self.token_ids, block_size, salt, already=hashes)


def begin(command: Submit, engine_id: int, block_size: int) -> Work:
    """A sequence that was just submitted; of those of equal priority, one with a lower ``engine_id`` goes first."""
    submission = command.submission
    work = Work(
        sink=command.sink,
        sequence_id=command.sequence_id,
        submission=submission,
        sequence=Sequence(
            sequence_id=engine_id,
            num_prompt_tokens=len(submission.prompt_ids),
            max_tokens=submission.max_tokens,
            priority=submission.priority,
            arrival=engine_id,
            reuse_prefix=submission.prompt_logprobs is None,
        ),
        token_ids=list(submission.prompt_ids),
        sampler=SamplerState(
            submission.sampling,
            submission.prompt_ids,
            stop_token_ids=submission.stop_token_ids,
            min_tokens=submission.min_tokens,
            grammar=None if submission.grammar is None else submission.grammar.start(),
        ),
        runs=TableRuns(block_size),
        submitted_s=command.at_s,
    )
    work.extend_hashes(block_size)
    return work
