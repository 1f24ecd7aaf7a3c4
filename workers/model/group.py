"""The ranks that compute a layer together, as the decoder sees them."""

from concurrent.futures import Future
from typing import Protocol

from torch import Tensor

from kernels.cpu.layers.partial import Partial, SumWork


class Group(Protocol):
    """Ranks that compute every layer of their stage together: parts of it, or all of it for different tokens."""

    @property
    def sums(self) -> bool:
        """Whether what a rank computes of a layer is a part of a sum; else it has its layers whole."""

    def all_reduce(self, x: Tensor) -> None:
        """Sums a contiguous ``x`` over the ranks, in place; all have the same bits afterwards."""

    def reduce(self, partial: Partial) -> None:
        """Sums what the ranks have parts of, and may finish it; all have the same bits afterwards."""

    def in_program(self, num_bytes: int) -> SumWork | None:
        """What sums tensors of bfloat16 on the host, of so many bytes each, within a program; None: :meth:`reduce`."""

    def begin_reduce(self, partial: Partial) -> Future[None]:
        """The same beside the computation, after what was begun before. Raises PeerFailed in the future.

        Who asks for the result has the sum: on a GPU, what it begins there then comes after it.
        """

    def settle(self) -> None:
        """Waits until all sums are there: nothing that was computed may leave the device before. Raises PeerFailed."""

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """The logits [R, V] of all ranks' parts ``x`` [R, V of the rank], at the leader; None elsewhere."""


class Alone:
    """A rank that computes everything."""

    @property
    def sums(self) -> bool:
        """There is nothing to add."""
        return False

    def all_reduce(self, x: Tensor) -> None:
        """The sum is there already."""

    def reduce(self, partial: Partial) -> None:
        """The sum is there already."""

    def in_program(self, num_bytes: int) -> SumWork | None:
        """The sums are there already."""
        return None

    def begin_reduce(self, partial: Partial) -> Future[None]:
        """The sum is there already."""
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def settle(self) -> None:
        """The sums are there already."""

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """All columns are there already."""
        return x
