"""Single steps of a runner, for tests that lay out their batches themselves."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from workers.sampling.sampling import SampledToken, SamplerState, SamplingParams
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput, StepResult


class Steps(Protocol):
    """What runs single steps: a runner, or one with the ranks that follow it."""

    def prepare(self, batch: Batch) -> Callable[[], StepResult]: ...


def greedy_sampler() -> SamplerState:
    """Takes the most likely token."""
    return SamplerState(SamplingParams(), ())


def run(runner: Steps, sequences: Sequence[SequenceInput]) -> list[SampledToken | None]:
    """One step: the next token of each sequence that asks for one."""
    tokens = runner.prepare(Batch(sequences=tuple(sequences)))().tokens
    assert all(isinstance(token, SampledToken | None) for token in tokens), tokens
    return [token for token in tokens if isinstance(token, SampledToken | None)]


def logits(runner: ModelRunner, sequences: Sequence[SequenceInput]) -> Tensor:
    """One step: the logits [T, V] after every token."""
    return runner.logits(Batch(sequences=tuple(sequences)))
