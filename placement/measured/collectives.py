"""Which way of summing over ranks for which size: decided by what each was measured to take on these links."""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

MEASURED_BYTES = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""Sizes of tensors that are measured, ascending."""

UNCHECKED_SAVES = 0.1

MESSAGE_S = 1e-4
"""What one more message of a sum is taken to cost two ranks: system calls, and a thread that is woken. Not measured for
each link. With 64 sequences over 1 Gbit/s strips so cut gained a twentieth; with 8, no value made a difference.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSum:
    """How a tensor of one size is summed.

    Attributes:
        num_bytes: of the tensor.
        algorithm: the fastest.
        duration_s: what it was measured to take, at the slowest rank.
    """

    num_bytes: int
    algorithm: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class AllReduceTable:
    """The algorithm for each size.

    Attributes:
        sizes: in bytes, ascending.
        names: of the algorithm for each of ``sizes``, and for what is nearer to it, by ratio, than to others.
        seconds: what each was measured to take; empty where nothing was.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...]
    seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert self.sizes and len(self.sizes) == len(self.names) and sorted(self.sizes) == list(self.sizes), self

    def __str__(self) -> str:
        """``1024:direct=0.05ms 4096:...``"""
        seconds = self.seconds or (float("nan"),) * len(self.sizes)
        rows = zip(self.sizes, self.names, seconds, strict=True)
        return " ".join(f"{size}:{name}={1000 * second:.3g}ms" for size, name, second in rows)

    @property
    def measured(self) -> tuple[MeasuredSum, ...]:
        """One for each size; none where nothing was measured."""
        if not self.seconds:
            return ()
        rows = zip(self.sizes, self.names, self.seconds, strict=True)
        return tuple(MeasuredSum(num_bytes=size, algorithm=name, duration_s=second) for size, name, second in rows)

    def choose(self, num_bytes: int) -> str:
        """The algorithm for a tensor."""
        at = bisect_left(self.sizes, num_bytes)
        if at == len(self.sizes):
            return self.names[-1]
        # Between two sizes, the nearer: num_bytes / before < after / num_bytes.
        if at and num_bytes * num_bytes < self.sizes[at - 1] * self.sizes[at]:
            at -= 1
        return self.names[at]

    def num_strips(self, num_bytes: int, most: int) -> int:
        """In how many strips to sum a tensor whose parts are sent as they are computed: a power of two, up to ``most``.

        With n strips, all but the last of which go while the next are computed, what is left to wait for is a latency
        and S / n B, and each strip costs what a message does: n is best where both are as long. What S takes beyond
        the least sum is S / B. Of two powers it is the nearer, by ratio.
        """
        if len(self.seconds) < 2:
            return 1
        transfer_s = self._seconds(num_bytes) - min(self.seconds)
        strips = 1
        while 2 * strips <= most and 2 * strips * strips * MESSAGE_S <= transfer_s:
            strips *= 2
        return strips

    def _seconds(self, num_bytes: int) -> float:
        """What a tensor takes: between two sizes that were measured, and beyond them, in proportion."""
        at = min(max(bisect_left(self.sizes, num_bytes), 1), len(self.sizes) - 1)
        (small, large), (less_s, more_s) = self.sizes[at - 1 : at + 1], self.seconds[at - 1 : at + 1]
        return less_s + (more_s - less_s) * (num_bytes - small) / (large - small)


def unmeasured(num_ranks: int) -> AllReduceTable:
    """What to use before anything is measured: for few ranks, the one with the fewest latencies."""
    return AllReduceTable(sizes=(1,), names=("direct" if num_ranks <= 4 else "scatter",))


def fastest(
    measured_s: Mapping[str, Sequence[float]], sizes: Sequence[int] = MEASURED_BYTES, *, unchecked: Collection[str] = ()
) -> AllReduceTable:
    """The table of the fastest algorithms; of equals, the one that comes first in ``measured_s``.

    Args:
        measured_s: seconds of each algorithm for each of ``sizes``, at the slowest rank.
        unchecked: those whose messages have no checksum, which must save ``UNCHECKED_SAVES`` of the time to be taken.
    """
    assert all(len(seconds) == len(sizes) for seconds in measured_s.values()), measured_s
    worth = {name: 1.0 - UNCHECKED_SAVES if name in unchecked else 1.0 for name in measured_s}
    best = [min(measured_s, key=lambda name: measured_s[name][at] / worth[name]) for at in range(len(sizes))]
    return AllReduceTable(
        sizes=tuple(sizes),
        names=tuple(best),
        seconds=tuple(measured_s[name][at] for at, name in enumerate(best)),
    )
