"""Adds the time of a step up from the measured times of its layers."""

from collections.abc import Sequence
from dataclasses import dataclass

from placement.serving.step_plan import Chunk
from placement.simulation.step_time import StepTime
from placement.simulation.tables import Reading, Table


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Holds what was measured of a model on a device, in seconds.

    Attributes:
        dense: of all that depends on the tokens of the step alone, over all layers.
        per_sequence: of what is done once for each sequence that samples.
        attention: of one layer, by tokens of the prompt, tokens before those, decodes and their mean context.
    """

    num_layers: int
    dense: Table
    per_sequence: Table
    attention: Table


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduces:
    """Describes the sums over the ranks of a stage, which each hold a part of every layer.

    Attributes:
        per_step: how many there are in a step: two in each layer.
        bytes_per_token: bytes of a token's activations.
        latency_s: seconds of a message of no size.
    """

    num_ranks: int
    per_step: int
    bytes_per_token: int
    latency_s: float
    bytes_per_s: float

    def step_s(self, num_tokens: int) -> float:
        """Returns the seconds of all sums of a step, each by what is faster.

        Either everybody sends all to everybody else at once, or parts go round a ring twice.
        """
        others, size_s = self.num_ranks - 1, num_tokens * self.bytes_per_token / self.bytes_per_s
        direct_s = self.latency_s + others * size_s
        ring_s = 2 * others * (self.latency_s + size_s / self.num_ranks)
        return self.per_step * min(direct_s, ring_s) if others else 0.0


class LayeredSteps:
    """Predicts steps from the times of their layers.

    Attention of a batch with contexts of several lengths takes as long as if all had the mean one.

    Args:
        step_s: seconds of each step beyond those of its layers, such as for launching it.
        sums: what the ranks of a stage do together, where there are several.
    """

    def __init__(self, times: LayerTimes, *, step_s: float = 0.0, sums: AllReduces | None = None) -> None:
        self._times = times
        self._step_s = step_s
        self._sums = sums
        # An attention call that does next to nothing: each further prompt is in the same call.
        self._call_s = times.attention.read(0, 0, 1, 1).value

    def step_time(self, chunks: Sequence[Chunk]) -> StepTime:
        """Returns the time of a step that computes ``chunks``."""
        times = self._times
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        num_samples = sum(chunk.samples for chunk in chunks)
        dense = times.dense.read(num_tokens)
        sampled = times.per_sequence.read(num_samples) if num_samples else Reading(0.0, True)
        attention = self._attention(chunks)
        sums_s = self._sums.step_s(num_tokens) if self._sums is not None else 0.0
        seconds = self._step_s + dense.value + times.num_layers * attention.value + sums_s + sampled.value
        return StepTime(seconds, dense.is_measured and attention.is_measured and sampled.is_measured)

    def _attention(self, chunks: Sequence[Chunk]) -> Reading:
        """Returns the time of attention in one layer."""
        table, count, context = self._times.attention, 0, 0
        prefills: list[tuple[int, int]] = []
        for chunk in chunks:
            if chunk.is_decode:
                count += 1
                context += chunk.start + 1
            else:
                prefills.append((chunk.num_tokens, chunk.start))
        prefills.sort()
        tokens, before = prefills.pop() if prefills else (0, 0)
        seconds, is_measured = table.read(tokens, before, count, context / count if count else 0)
        for more, start in prefills:
            reading = table.read(more, start, 0, 0)
            seconds += max(0.0, reading.value - self._call_s)
            is_measured = is_measured and reading.is_measured
        return Reading(seconds, is_measured)
