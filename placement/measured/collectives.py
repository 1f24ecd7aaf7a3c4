"""Chooses the all-reduce algorithm for each size of tensor, by what was measured on the links of these ranks."""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

MEASURED_BYTES = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""The sizes of tensors that are measured, ascending."""

UNCHECKED_SAVES = 0.1
"""The share of the time that an algorithm without checksums must save to be chosen."""

MESSAGE_S = 1e-4
"""The assumed cost of one more message between two ranks: system calls, and a thread that is woken.

It is not measured for each link. With 64 sequences over 1 Gbit/s, strips cut by this value saved a twentieth of the
time; with 8 sequences no value made a difference.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSum:
    """The all-reduce that was chosen for tensors of one size.

    Attributes:
        num_bytes: bytes of the tensor.
        algorithm: the name of the fastest algorithm.
        duration_s: seconds that it took at the slowest rank.
    """

    num_bytes: int
    algorithm: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class AllReduceTable:
    """The all-reduce algorithm for each size of tensor.

    Attributes:
        sizes: bytes of a tensor, ascending.
        names: the algorithm for each of ``sizes``, and for tensors whose size is nearest to it by ratio.
        seconds: seconds that each took; empty where nothing was measured.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...]
    seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert self.sizes and len(self.sizes) == len(self.names) and sorted(self.sizes) == list(self.sizes), self

    def __str__(self) -> str:
        """Writes the algorithm and the time of each size, such as ``1024:direct=0.05ms 4096:...``."""
        seconds = self.seconds or (float("nan"),) * len(self.sizes)
        rows = zip(self.sizes, self.names, seconds, strict=True)
        return " ".join(f"{size}:{name}={1000 * second:.3g}ms" for size, name, second in rows)

    @property
    def latency_s(self) -> float:
        """Returns the seconds of the fastest sum that was measured. Something was measured."""
        return min(self.seconds)

    @property
    def bytes_per_s(self) -> float:
        """Returns how many bytes of the largest tensor were summed in a second. Something was measured."""
        return self.sizes[-1] / max(self.seconds[-1], 1e-9)

    @property
    def measured(self) -> tuple[MeasuredSum, ...]:
        """Lists the choice for each size. It is empty where nothing was measured."""
        if not self.seconds:
            return ()
        rows = zip(self.sizes, self.names, self.seconds, strict=True)
        return tuple(MeasuredSum(num_bytes=size, algorithm=name, duration_s=second) for size, name, second in rows)

    def choose(self, num_bytes: int) -> str:
        """Returns the algorithm for a tensor of ``num_bytes``."""
        index = bisect_left(self.sizes, num_bytes)
        if index == len(self.sizes):
            return self.names[-1]
        # Between two sizes, the nearer one wins: num_bytes / before < after / num_bytes.
        if index and num_bytes * num_bytes < self.sizes[index - 1] * self.sizes[index]:
            index -= 1
        return self.names[index]

    def num_strips(self, num_bytes: int, most: int) -> int:
        """Returns into how many strips to cut a tensor that is all-reduced while it is computed.

        A strip is sent as soon as it is computed. With n strips of a tensor of S bytes over B bytes a second, all but
        the last go while the next are computed, so the ranks wait for one latency and S / (n B) seconds; and each strip
        costs ``MESSAGE_S``. The best n makes both equal. S / B is estimated as what the tensor takes beyond the fastest
        all-reduce.

        Returns:
            A power of two, at most ``most``; of two powers, the one that is nearer to the best n by ratio.
        """
        if len(self.seconds) < 2:
            return 1
        transfer_s = self._seconds(num_bytes) - min(self.seconds)
        strips = 1
        while 2 * strips <= most and 2 * strips * strips * MESSAGE_S <= transfer_s:
            strips *= 2
        return strips

    def _seconds(self, num_bytes: int) -> float:
        """Predicts the seconds of a tensor's all-reduce, linear between the measured sizes and beyond them."""
        index = min(max(bisect_left(self.sizes, num_bytes), 1), len(self.sizes) - 1)
        (small, large), (less_s, more_s) = self.sizes[index - 1 : index + 1], self.seconds[index - 1 : index + 1]
        return less_s + (more_s - less_s) * (num_bytes - small) / (large - small)


def unmeasured(num_ranks: int) -> AllReduceTable:
    """Returns the table that holds before anything is measured: for few ranks, the algorithm of fewest latencies."""
    return AllReduceTable(sizes=(1,), names=("direct" if num_ranks <= 4 else "scatter",))


def fastest(
    measured_s: Mapping[str, Sequence[float]], sizes: Sequence[int] = MEASURED_BYTES, *, unchecked: Collection[str] = ()
) -> AllReduceTable:
    """Makes the table of the fastest algorithms; of equally fast ones, the first in ``measured_s`` is chosen.

    Args:
        measured_s: seconds that each algorithm took for each of ``sizes`` at the slowest rank.
        unchecked: algorithms whose messages have no checksum; they must save ``UNCHECKED_SAVES`` of the time.
    """
    assert all(len(seconds) == len(sizes) for seconds in measured_s.values()), measured_s
    factors = {name: 1.0 - UNCHECKED_SAVES if name in unchecked else 1.0 for name in measured_s}
    best = [min(measured_s, key=lambda name: measured_s[name][index] / factors[name]) for index in range(len(sizes))]
    return AllReduceTable(
        sizes=tuple(sizes),
        names=tuple(best),
        seconds=tuple(measured_s[name][index] for index, name in enumerate(best)),
    )
