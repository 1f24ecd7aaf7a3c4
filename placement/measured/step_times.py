"""Describes how long steps of some sizes take, as the leader of a replica measures it before the first request.

The measurement grows from one token in powers of two. On the slowest machine a step of hundreds of tokens takes
minutes, so the time of one size decides whether the next is measured at all.
"""

from dataclasses import dataclass

WARM_UP_S = 5.0
"""The most seconds that the measured steps of a warm-up are predicted to take together. The slowest machine spends
these seconds on a few small steps; a fast one measures the largest step long before. What the first steps take to
compile code comes on top."""

LEAST_CHUNK = 2
"""The tokens of the smallest chunk. It is measured whatever it takes, since chunks run other code than single tokens:
that code is compiled by the first of them."""


def seconds(duration_s: float) -> str:
    """Writes seconds for people, with two digits or all those before the point, such as ``0.41`` or ``84``."""
    return f"{duration_s:.0f}" if duration_s >= 10 else f"{duration_s:.2g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """The measurement of a step.

    Attributes:
        num_tokens: tokens of the step.
        duration_s: seconds that it took, through all ranks of the replica.
    """

    num_tokens: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """The measurements of a replica, by the size of the step, ascending."""

    steps: tuple[MeasuredStep, ...] = ()

    def __post_init__(self) -> None:
        sizes = [step.num_tokens for step in self.steps]
        assert sizes == sorted(set(sizes)) and min(sizes, default=1) >= 1, self

    def __str__(self) -> str:
        """Writes each size with its time, such as ``1:0.012s 2:0.014s``."""
        return " ".join(f"{step.num_tokens}:{seconds(step.duration_s)}s" for step in self.steps)

    def expected_s(self, num_tokens: int) -> float:
        """Returns the seconds that a step of ``num_tokens`` is expected to take at the most; 0 where none is measured.

        That is the longest measurement up to the next size that was measured. Beyond the largest size, time grows in
        proportion to the tokens, as it does where the products of a step limit it.
        """
        if not self.steps:
            return 0.0
        largest = self.steps[-1]
        if num_tokens > largest.num_tokens:
            return largest.duration_s * num_tokens / largest.num_tokens
        reached = next(step.num_tokens for step in self.steps if step.num_tokens >= num_tokens)
        return max(step.duration_s for step in self.steps if step.num_tokens <= reached)

    def with_step(self, num_tokens: int, duration_s: float) -> "StepTimes":
        """Returns the measurements with that of a larger step."""
        return StepTimes(steps=(*self.steps, MeasuredStep(num_tokens=num_tokens, duration_s=duration_s)))


def next_size(times: StepTimes, *, most_tokens: int, spent_s: float, step_time_s: float | None) -> int | None:
    """Decides the size of the step to measure next; None where the measurement is done.

    Sizes are the powers of two up to ``most_tokens``, and ``most_tokens`` itself. The measurement ends at the first
    size that takes longer than ``step_time_s``. It also ends before a size that, in proportion to the one before, would
    take all steps together over :func:`most_spent_s`; only the first chunk is measured in any case.

    Args:
        times: the measurements so far.
        most_tokens: the most tokens of a step.
        spent_s: seconds that the steps so far took together.
        step_time_s: the longest that a step may take; None: sizes are not chosen by it.
    """
    if most_tokens < 1:
        return None
    if not times.steps:
        return 1
    last = times.steps[-1]
    size = min(2 * last.num_tokens, most_tokens)
    if size <= last.num_tokens:
        return None
    if size <= LEAST_CHUNK:
        return size
    is_slow = step_time_s is not None and last.duration_s > step_time_s
    if is_slow or spent_s + times.expected_s(size) > most_spent_s(step_time_s):
        return None
    return size


def most_spent_s(step_time_s: float | None) -> float:
    """Returns the most seconds that the measured steps may take together.

    Four times ``step_time_s`` are enough to find the first size that takes longer: sizes double, so that all steps
    within the objective take about twice as long as the last of them, and the one beyond it twice as long again.
    """
    return WARM_UP_S if step_time_s is None else max(WARM_UP_S, 4 * step_time_s)


def is_believed(times: StepTimes, num_tokens: int, duration_s: float, *, step_time_s: float | None) -> bool:
    """Tells whether a measurement is believed at once, or is made once more, as something else took its time.

    That is the case for the first step of a kind, which compiles code, and where the machine was busy. A step is made
    once more where it takes longer than in proportion to the size before, or is the first that takes longer than
    ``step_time_s``, which ends the measurement.
    """
    if not times.steps:
        return False
    is_first_slow = step_time_s is not None and times.steps[-1].duration_s <= step_time_s < duration_s
    return not is_first_slow and duration_s <= times.expected_s(num_tokens)
