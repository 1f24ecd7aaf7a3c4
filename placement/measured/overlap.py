"""How many lanes a step's tokens are computed in, so that sums over ranks hide behind computation.

In two lanes, the sums of one hide behind the computation of the other; but each weight is read twice, and products of
few tokens take hardly less time than those of many. So what each takes is measured, when the ranks start, and a step
is woven only where that was faster (TokenWeave, Gond et al. 2025, which profiles its split likewise).
"""

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_GAIN = 0.03
"""Of the time of one lane, that two must gain in the measurement: what is within its noise is not taken."""
LANE_TOKENS = 32
"""The first lane has a multiple of so many tokens, which the kernels compute at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLanes:
    """What was measured of steps of one size.

    Attributes:
        num_tokens: of the step.
        alone_s, woven_s: what some layers of it took, in one lane and in two, at the slowest rank.
        is_woven: such steps are computed in two lanes.
    """

    num_tokens: int
    alone_s: float
    woven_s: float
    is_woven: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapTable:
    """What was measured.

    Attributes:
        num_tokens: of the steps that were measured, ascending.
        alone_s, woven_s: what some layers of each took, in one lane and in two, at the slowest rank.
    """

    num_tokens: tuple[int, ...] = ()
    alone_s: tuple[float, ...] = ()
    woven_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.num_tokens) == len(self.alone_s) == len(self.woven_s), self
        assert sorted(self.num_tokens) == list(self.num_tokens), self

    def __str__(self) -> str:
        """``64:1.2/1.4ms 128:...``: alone, and woven."""
        rows = zip(self.num_tokens, self.alone_s, self.woven_s, strict=True)
        return " ".join(f"{count}:{1e3 * alone:.3g}/{1e3 * woven:.3g}ms" for count, alone, woven in rows)

    @property
    def measured(self) -> tuple[MeasuredLanes, ...]:
        """One for each size; none where nothing was measured."""
        rows = zip(self.num_tokens, self.alone_s, self.woven_s, strict=True)
        return tuple(
            MeasuredLanes(num_tokens=count, alone_s=alone_s, woven_s=woven_s, is_woven=self.pays(count))
            for count, alone_s, woven_s in rows
        )

    def pays(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens is faster in two lanes: so it was at the next smaller that was measured, and
        at the next larger.
        """
        near = [at for at, count in enumerate(self.num_tokens) if count <= num_tokens][-1:]
        near += [at for at, count in enumerate(self.num_tokens) if count >= num_tokens][:1]
        if not near or self.num_tokens[near[0]] > num_tokens:
            return False
        return all(self.woven_s[at] < (1 - LEAST_GAIN) * self.alone_s[at] for at in near)


def first_lane(num_tokens: int) -> int:
    """Tokens of the first of two lanes: half of them, rounded to what suits the kernels."""
    return (num_tokens + LANE_TOKENS) // (2 * LANE_TOKENS) * LANE_TOKENS


def measured_sizes(token_budget: int) -> Sequence[int]:
    """Steps to measure: powers of two that two lanes can share, up to the budget."""
    size, sizes = 2 * LANE_TOKENS, []
    while size <= token_budget:
        sizes.append(size)
        size *= 2
    return sizes
