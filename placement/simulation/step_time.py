"""Describes what tells a simulation how long a step takes."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from placement.serving.step_plan import Chunk


class StepTime(NamedTuple):
    """The time of a step.

    Attributes:
        seconds: from its start until its tokens are known.
        is_measured: whether the step lies within what was measured; False: the time is extrapolated.
    """

    seconds: float
    is_measured: bool = True


class StepModel(Protocol):
    """Tells how long steps take on the devices of a replica."""

    def step_time(self, chunks: Sequence[Chunk]) -> StepTime:
        """Returns the time of a step that computes ``chunks``: at least one, decodes before prefills."""


class LinearSteps:
    """Takes a fixed time for each step, and a time for each token, as a first estimate does."""

    def __init__(self, *, fixed_s: float, decode_s: float, prefill_s: float) -> None:
        self._fixed_s = fixed_s
        self._decode_s = decode_s
        self._prefill_s = prefill_s

    def step_time(self, chunks: Sequence[Chunk]) -> StepTime:
        """Returns the time of a step that computes ``chunks``."""
        seconds = self._fixed_s
        for chunk in chunks:
            seconds += self._decode_s if chunk.is_decode else self._prefill_s * chunk.num_tokens
        return StepTime(seconds)
