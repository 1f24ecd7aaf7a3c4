"""Defines the ranks that compute a layer together, as the decoder sees them."""

from concurrent.futures import Future
from typing import Protocol

from torch import Tensor

from kernels.cpu.layers.partial import Partial, SumWork


class Group(Protocol):
    """Ranks that compute every layer of their stage together: a part of it each, or all of it for different tokens."""

    @property
    def sums(self) -> bool:
        """Tells whether a rank computes partial results, which are all-reduced; otherwise it has its layers whole."""

    def all_reduce(self, x: Tensor) -> None:
        """Sums a contiguous ``x`` over the ranks in place. All ranks have the same bits afterwards."""

    def reduce(self, partial: Partial) -> None:
        """All-reduces a partial result, and may finish it. All ranks have the same bits afterwards."""

    def in_program(self, num_bytes: int) -> SumWork | None:
        """Returns what all-reduces bfloat16 tensors of ``num_bytes`` on the host within a program.

        It is None where :meth:`reduce` must be called instead.
        """

    def begin_reduce(self, partial: Partial) -> Future[None]:
        """Starts :meth:`reduce` beside the computation, after those that were started before.

        The future raises PeerFailed. A caller that has its result may use the sum; on a GPU, kernels that the caller
        launches afterwards run after it.
        """

    def settle(self) -> None:
        """Waits until all sums have arrived, since results may not leave the device before. Raises PeerFailed."""

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Puts the logits [R, V] together from all ranks' columns ``x``, at the leader; None elsewhere."""


class Alone:
    """A rank that computes everything, so that it has no partial results to sum."""

    @property
    def sums(self) -> bool:
        """Tells that there are no partial results."""
        return False

    def all_reduce(self, x: Tensor) -> None:
        """Leaves ``x`` as it is."""

    def reduce(self, partial: Partial) -> None:
        """Leaves the result as it is."""

    def in_program(self, num_bytes: int) -> SumWork | None:
        """Returns None: a program has nothing to sum."""
        return None

    def begin_reduce(self, partial: Partial) -> Future[None]:
        """Returns a future that is done."""
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def settle(self) -> None:
        """Returns at once."""

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Returns ``x``, which has all columns."""
        return x
