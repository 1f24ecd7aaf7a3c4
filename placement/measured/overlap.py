"""Decides which steps are computed in two micro-batches, so that all-reduces hide behind computation.

While the all-reduce of one micro-batch is on its way, the other micro-batch is computed. The price is that each weight
is read twice, and that a product of few tokens takes hardly less time than one of many. So the ranks measure both when
they start, and a step is overlapped only where that was faster (TokenWeave, Gond et al. 2025, profiles its split in the
same manner).
"""

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_GAIN = 0.03
"""The share of the time that two micro-batches must save in the measurement. Less than that is within its noise."""
MICRO_BATCH_TOKENS = 32
"""The kernels compute this many tokens at once, so the first micro-batch has a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredOverlap:
    """The measurement of steps of one size.

    Attributes:
        num_tokens: tokens of the step.
        alone_s, overlapped_s: seconds that some of its layers took at the slowest rank, in one micro-batch and in two.
        is_overlapped: whether steps of this size are computed in two micro-batches.
    """

    num_tokens: int
    alone_s: float
    overlapped_s: float
    is_overlapped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapTable:
    """All measurements of a stage, by the size of the step.

    Attributes:
        num_tokens: tokens of the steps that were measured, ascending.
        alone_s, overlapped_s: seconds that some layers of each took at the slowest rank, in one micro-batch and in two.
    """

    num_tokens: tuple[int, ...] = ()
    alone_s: tuple[float, ...] = ()
    overlapped_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.num_tokens) == len(self.alone_s) == len(self.overlapped_s), self
        assert sorted(self.num_tokens) == list(self.num_tokens), self

    def __str__(self) -> str:
        """Writes each size with its two times, such as ``64:1.2/1.4ms 128:...``: in one micro-batch, and in two."""
        rows = zip(self.num_tokens, self.alone_s, self.overlapped_s, strict=True)
        return " ".join(f"{count}:{1e3 * alone:.3g}/{1e3 * overlapped:.3g}ms" for count, alone, overlapped in rows)

    @property
    def measured(self) -> tuple[MeasuredOverlap, ...]:
        """Lists the measurement of each size. It is empty where nothing was measured."""
        rows = zip(self.num_tokens, self.alone_s, self.overlapped_s, strict=True)
        return tuple(
            MeasuredOverlap(
                num_tokens=count, alone_s=alone_s, overlapped_s=overlapped_s, is_overlapped=self.pays(count)
            )
            for count, alone_s, overlapped_s in rows
        )

    def pays(self, num_tokens: int) -> bool:
        """Tells whether a step of ``num_tokens`` is faster in two micro-batches.

        It is where that was faster both at the next smaller and at the next larger size that was measured.
        """
        near = [index for index, count in enumerate(self.num_tokens) if count <= num_tokens][-1:]
        near += [index for index, count in enumerate(self.num_tokens) if count >= num_tokens][:1]
        if not near or self.num_tokens[near[0]] > num_tokens:
            return False
        return all(self.overlapped_s[index] < (1 - LEAST_GAIN) * self.alone_s[index] for index in near)


def first_micro_batch(num_tokens: int) -> int:
    """Counts the tokens of the first of two micro-batches: about half, rounded to what the kernels compute at once."""
    return (num_tokens + MICRO_BATCH_TOKENS) // (2 * MICRO_BATCH_TOKENS) * MICRO_BATCH_TOKENS


def measured_sizes(token_budget: int) -> Sequence[int]:
    """Lists the step sizes to measure: powers of two that two micro-batches can share, up to the budget."""
    size, sizes = 2 * MICRO_BATCH_TOKENS, []
    while size <= token_budget:
        sizes.append(size)
        size *= 2
    return sizes
