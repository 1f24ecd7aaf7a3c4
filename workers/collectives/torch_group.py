"""The ranks of a stage as a process group of torch.distributed: gloo for tensors on the host, NCCL for those on GPUs.

The all-reduces of these libraries add in an order that depends on the tensor's size, in rings and trees that round at
every hop. So each rank receives the others' tensors by an all-gather and adds them itself in rank order, as
:mod:`workers.collectives.algorithms` does, which gives the same bits. With n ranks and S bytes, the ways are:

    gathered    all-gather, then every rank adds              a + (n-1) S/B        small tensors
    scattered   reduce-scatter, then all-gather               2a + 2 (n-1)/n S/B   large tensors of more than two ranks
    reduced     gloo's own all-reduce                         2a + S/B             large tensors of two ranks on hosts

The last has the same bits too, since a sum of two is rounded once, whoever adds it. It adds what has come while the
rest still comes, which takes two thirds of the time with 4 MB on one machine.

Nothing is pickled: these are collectives of plain tensors, whose sizes all ranks know. The backend opens connections of
its own while the group is set up, on the interface that the rank listens on; they have neither token nor checksum.

A wait for a rank that is alive may take as long as :meth:`TorchGroup.wait_at_most` says, but one for a rank that is
lost should end with its pulse. A backend knows of no pulse, so waits are cut into short slices. A collective that hangs
is left to a thread that keeps it until it ends.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor

from kernels.cpu.layers.partial import Finish, Partial, SumWork
from workers.collectives.algorithms import add_in_order
from workers.collectives.group import COLLECTIVE_S
from workers.transport.errors import PeerFailed
from workers.transport.pulse import Pulse

CHECK_S = 0.1
"""How often a wait checks whether the other ranks are alive."""

LARGE_BYTES = 1 << 18
"""From this size on the bytes that are sent determine the time, and below it the number of messages."""

# Gloo reports within a tenth of a second that some peer closed its connections; soon after, the pulse tells which
# and why.
_CAUSE_S = 2.0


class Work(Protocol):
    """A collective of torch.distributed that was started; the name is torch's."""

    def is_completed(self) -> bool:
        """Tells whether it has ended, successfully or not."""

    def wait(self, timeout: timedelta = ...) -> bool:
        """Waits for the end. Raises RuntimeError where it failed or the time is over; may be called again."""


class Backend(Protocol):
    """The part of torch.distributed's backends that is used here and that their own types leave out."""

    def size(self) -> int:
        """Returns the number of ranks."""

    def allreduce(self, tensors: list[Tensor], /) -> Work:
        """Sums over the ranks, in place."""

    def _allgather_base(self, into: Tensor, own: Tensor, /) -> Work: ...

    def alltoall_base(self, into: Tensor, x: Tensor, received_sizes: list[int], sent_sizes: list[int], /) -> Work:
        """Sends each rank a chunk of ``x``; where no sizes are given all chunks have the same."""

    def _set_default_timeout(self, timeout: timedelta) -> None: ...

    def shutdown(self) -> None:
        """Ends a backend that has nothing to do."""

    def abort(self) -> None:
        """Ends a backend that hangs."""


def let_backend_wait(backend: Backend, limit_s: float) -> None:
    """Has a backend give up a second later than a rank's own wait of ``limit_s``, which names a rank."""
    backend._set_default_timeout(timedelta(seconds=limit_s + 1.0))


class TorchGroup(ABC):
    """A :class:`workers.model.group.Group` over a backend of torch.distributed. For one thread at a time.

    Args:
        backend: a backend that all ranks have set up; the group takes ownership.
        rank: the number of this rank in the group.
        members: the number in the replica of each rank of the group.
        pulse: knows whether the ranks are alive.
        widths: the number of vocabulary rows of each rank.
    """

    sums = True

    def __init__(
        self, *, backend: Backend, rank: int, members: Sequence[int], pulse: Pulse, widths: Sequence[int]
    ) -> None:
        self.rank = rank
        self._members = members
        self._pulse = pulse
        self._widths = widths
        self._backend: Backend | None = backend
        self._last: Work | None = None
        self._deadline_s = 0.0
        self._limit_s = COLLECTIVE_S
        self._backend_limit_s = COLLECTIVE_S

    def wait_at_most(self, limit_s: float) -> None:
        """Sets how long this rank waits for others that are alive, in collectives that begin from now on."""
        self._limit_s = limit_s

    @property
    def num_ranks(self) -> int:
        """Returns the number of ranks, this one included."""
        return len(self._members)

    @torch.inference_mode()  # each calling thread has its own mode
    def all_reduce(self, x: Tensor) -> None:
        """Sums a contiguous tensor over the ranks, in place. Raises PeerFailed."""
        if not x.numel() or self.num_ranks == 1:
            return
        flat = x.view(-1)
        if x.nbytes >= LARGE_BYTES:
            self._sum_large(flat)
        else:
            self._sum_gathered(flat)

    def reduce(self, partial: Partial) -> None:
        """Sums the ranks' partial updates; of a large one each rank finishes its own rows. Raises PeerFailed."""
        update = partial.update
        is_even = len(update) % self.num_ranks == 0
        if partial.finish is not None and update.nbytes >= LARGE_BYTES and is_even and self.num_ranks > 1:
            self._reduce_rows(update, partial.finish)
            partial.is_finished = True
        else:
            self.all_reduce(update)

    def in_program(self, num_bytes: int) -> SumWork | None:
        """Returns None, since the backend is called from Python."""
        del num_bytes
        return None

    @abstractmethod
    def begin_reduce(self, partial: Partial) -> Future[None]:
        """Runs :meth:`reduce` in the background, after what was begun before. The future raises PeerFailed."""

    @abstractmethod
    def settle(self) -> None:
        """Blocks the host until all sums are there. Raises PeerFailed."""

    @torch.inference_mode()
    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Gathers the ranks' logits [R, V of the rank] at rank 0, as [R, V]; None elsewhere. Raises PeerFailed."""
        sizes = [len(x) * width for width in self._widths]
        received_sizes = [0] * self.num_ranks if self.rank else sizes
        sent_sizes = [sizes[self.rank], *[0] * (self.num_ranks - 1)]
        received = x.new_empty(sum(received_sizes))
        self._run(lambda backend: backend.alltoall_base(received, x.reshape(-1), received_sizes, sent_sizes))
        self.settle()
        if self.rank:
            return None
        parts = zip(torch.split(received, sizes), self._widths, strict=True)
        return torch.cat([part.view(len(x), width) for part, width in parts], dim=1)

    def close(self) -> None:
        """Ends the group. A collective that another thread waits for raises PeerFailed."""
        backend, self._backend = self._backend, None
        if backend is not None:
            self._end(backend, self._last)

    def _sum_gathered(self, x: Tensor) -> None:
        """Sums a small tensor [m]: every rank adds all of it."""
        parts = x.new_empty(self.num_ranks, x.numel())
        self._gather(parts.view(-1), x)
        add_in_order(list(parts), x)

    def _sum_large(self, x: Tensor) -> None:
        """Sums a large tensor [n * m]: each of n ranks adds m numbers. Falls back to the way of small tensors."""
        if self.num_ranks == 2 or x.numel() % self.num_ranks:
            self._sum_gathered(x)
            return
        parts = x.new_empty(self.num_ranks, x.numel() // self.num_ranks)
        self._run(lambda backend: backend.alltoall_base(parts.view(-1), x.view(-1), [], []))
        own = torch.empty_like(parts[0])
        add_in_order(list(parts), own)
        self._gather(x, own)

    def _reduce_rows(self, update: Tensor, finish: Finish) -> None:
        """Sums [n * m, E]: each of n ranks adds and finishes m rows, and the finished rows are gathered.

        That is a reduce-scatter, residual and norm, and an all-gather (TokenWeave, Gond et al. 2025): see
        :mod:`kernels.cpu.layers.partial`.
        """
        share = len(update) // self.num_ranks
        own = slice(self.rank * share, (self.rank + 1) * share)
        parts = update.new_empty(self.num_ranks, share, *update.shape[1:])
        self._run(lambda backend: backend.alltoall_base(parts.view(-1), update.view(-1), [], []))
        add_in_order(list(parts), update[own])
        finish.rows(own.start, own.stop)
        self._gather(finish.result.view(-1), finish.result[own].clone().view(-1))

    def _gather(self, into: Tensor, own: Tensor) -> None:
        """Runs an all-gather of flat tensors."""
        # These views belong to the backend alone, whose thread releases them without the interpreter's lock.
        self._run(lambda backend: backend._allgather_base(into.view(-1), own.view(-1)))

    def _running(self) -> Backend:
        """Returns the backend. Raises PeerFailed where the group has ended or a rank is lost."""
        self._pulse.check()
        if self._backend is None:
            raise PeerFailed.ended_here(self._other)
        return self._backend

    def _run(self, start: Callable[[Backend], Work]) -> None:
        """Starts a collective and waits for it. Where it raises PeerFailed, the group has ended."""
        backend, limit_s = self._running(), self._limit_s
        if limit_s != self._backend_limit_s:
            let_backend_wait(backend, limit_s)
            self._backend_limit_s = limit_s
        try:
            work = self._last = start(backend)
        except RuntimeError as error:  # NCCL checks its connections here
            raise self._broken(error) from error
        self._deadline_s = time.monotonic() + limit_s
        try:
            self._finish(work)
        except PeerFailed:
            self._backend = None
            self._end(backend, work)  # a thread that closed the group meanwhile may not have known of this collective
            raise

    @property
    def _other(self) -> int:
        """Returns some other rank of the replica, to name where it is not known which one failed."""
        return self._members[0 if self.rank else -1]

    def _check(self) -> None:
        """Raises PeerFailed where a wait is to end."""
        self._running()
        if time.monotonic() >= self._deadline_s:
            raise PeerFailed.timed_out(self._other)

    def _broken(self, error: RuntimeError) -> PeerFailed:
        """Translates a backend's error; waits for the pulse to tell which rank failed and why."""
        until_s = time.monotonic() + _CAUSE_S
        while self._pulse.lost is None and self._backend is not None and time.monotonic() < until_s:
            time.sleep(CHECK_S / 10)
        lost = self._pulse.lost
        if lost is not None:
            return PeerFailed(lost.rank, lost.cause)
        return PeerFailed(self._other, f"its connection broke ({str(error).splitlines()[0]})")

    @abstractmethod
    def _finish(self, work: Work) -> None:
        """Has what computes wait for a collective: the host, or its stream. Raises PeerFailed."""

    @abstractmethod
    def _end(self, backend: Backend, last: Work | None) -> None:
        """Ends the backend, whose ``last`` collective may hang, without waiting for that."""
