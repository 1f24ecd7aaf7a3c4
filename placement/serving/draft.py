"""Puts a step together, chunk by chunk."""

from dataclasses import dataclass, field

from placement.serving.sequence import Sequence
from placement.serving.step_plan import Chunk, StepPlan


@dataclass(slots=True)
class Draft:
    """Holds a step that the scheduler puts together.

    Attributes:
        budget: how many tokens still fit.
    """

    step: int
    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)

    def add(self, sequence: Sequence, num_tokens: int, *, is_decode: bool) -> None:
        """Adds the next tokens of a sequence."""
        assert 1 <= num_tokens <= self.budget and sequence.step is None, sequence
        samples = num_tokens == sequence.num_uncomputed_tokens
        chunk = Chunk(sequence.sequence_id, sequence.num_computed_tokens, num_tokens, samples, is_decode)
        self.chunks.append(chunk)
        self.budget -= num_tokens
        sequence.step = self.step

    def plan(self) -> StepPlan:
        """Returns the decision."""
        return StepPlan(
            step=self.step if self.chunks else self.step - 1,
            chunks=tuple(self.chunks),
            preempted=tuple(self.preempted),
            reserved=tuple(self.reserved),
        )
