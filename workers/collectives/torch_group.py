"""The ranks of a stage as a process group of torch.distributed: gloo for tensors on the host, NCCL for those on GPUs.

An all-reduce of theirs adds in an order that depends on the tensor's size: rings and trees, rounded at every hop. So a
rank is given what all others have, by an all-gather, and adds it itself, in the order of ranks, as
:mod:`workers.collectives.algorithms` does: the same bits, whichever way is taken. With n ranks and S bytes:

    gathered    everyone is given all                         a + (n-1) S/B        small sums
    scattered   everyone sums a part, which all are given     2a + 2 (n-1)/n S/B   large sums of more than two ranks
    reduced     gloo's own all-reduce                         2a + S/B             large sums of two ranks on the host

The last has the same bits too: what two ranks add is rounded once, whoever adds it. It adds what came while the rest
comes, which with 4 MB on one machine takes two thirds of the time.

Nothing is pickled: these are collectives of plain tensors, whose sizes all ranks know. The connections are the
backend's own, opened on the interface that the rank listens on while the group is set up; they have neither token nor
checksum.

Waiting for a rank that lives may take COLLECTIVE_S, for one that does not a pulse: a backend knows of no pulse, so the
wait is cut into slices. Work that hangs then is left to a thread that holds it until it ends.
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

LOOK_S = 0.1
"""A wait looks this often whether the others still live."""

LARGE_BYTES = 1 << 18
"""From here on what counts is how many bytes go, and before, how often."""

# Gloo says in a tenth of a second that a peer closed its connections; the pulse, soon after, which one and why.
_CAUSE_S = 2.0


class Work(Protocol):
    """A collective of torch.distributed that was begun."""

    def is_completed(self) -> bool:
        """Whether it has ended, in whatever way."""

    def wait(self, timeout: timedelta = ...) -> bool:
        """Raises RuntimeError where it failed, or the time is over; may be called again."""


class Backend(Protocol):
    """What is used here of torch.distributed's own classes, whose types do not tell of it."""

    def size(self) -> int:
        """How many ranks there are."""

    def allreduce(self, tensors: list[Tensor], /) -> Work:
        """Sums in place."""

    def _allgather_base(self, into: Tensor, mine: Tensor, /) -> Work: ...

    def alltoall_base(self, into: Tensor, x: Tensor, takes: list[int], gives: list[int], /) -> Work:
        """Gives each rank a part of ``x``; no sizes: parts of one size."""

    def _set_default_timeout(self, timeout: timedelta) -> None: ...

    def shutdown(self) -> None:
        """Of one that has nothing to do."""

    def abort(self) -> None:
        """Of one that hangs."""


class TorchGroup(ABC):
    """A :class:`workers.model.group.Group` over a backend of torch.distributed. For one thread at a time.

    Args:
        backend: set up, of all ranks; this takes it over.
        rank: of this rank in the group.
        members: the rank in the replica of each rank of the group.
        pulse: knows whether they live.
        widths: vocabulary rows of each rank.
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

    @property
    def num_ranks(self) -> int:
        """How many ranks there are, with this one."""
        return len(self._members)

    @torch.inference_mode()  # of the calling thread
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
        """Sums what the ranks have parts of; of a large one each finishes its rows. Raises PeerFailed."""
        update = partial.update
        is_even = len(update) % self.num_ranks == 0
        if partial.finish is not None and update.nbytes >= LARGE_BYTES and is_even and self.num_ranks > 1:
            self._reduce_rows(update, partial.finish)
            partial.is_finished = True
        else:
            self.all_reduce(update)

    def in_program(self, num_bytes: int) -> SumWork | None:
        """Nothing: the backend is called from Python."""
        del num_bytes
        return None

    @abstractmethod
    def begin_reduce(self, partial: Partial) -> Future[None]:
        """The same beside the computation, after what was begun before. Raises PeerFailed in the future."""

    @abstractmethod
    def settle(self) -> None:
        """Waits until all sums are there, on the host too. Raises PeerFailed."""

    @torch.inference_mode()
    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Logits [R, V of the rank] of all ranks side by side [R, V], at rank 0; None elsewhere. Raises PeerFailed."""
        sizes = [len(x) * width for width in self._widths]
        takes = [0] * self.num_ranks if self.rank else sizes
        gives = [sizes[self.rank], *[0] * (self.num_ranks - 1)]
        came = x.new_empty(sum(takes))
        self._do(lambda backend: backend.alltoall_base(came, x.reshape(-1), takes, gives))
        self.settle()
        if self.rank:
            return None
        parts = zip(torch.split(came, sizes), self._widths, strict=True)
        return torch.cat([part.view(len(x), width) for part, width in parts], dim=1)

    def close(self) -> None:
        """Ends the group. A wait for it, on another thread, raises PeerFailed."""
        backend, self._backend = self._backend, None
        if backend is not None:
            self._end(backend, self._last)

    def _sum_gathered(self, x: Tensor) -> None:
        """Sums [m], all of which everyone adds."""
        parts = x.new_empty(self.num_ranks, x.numel())
        self._gather(parts.view(-1), x)
        add_in_order(list(parts), x)

    def _sum_large(self, x: Tensor) -> None:
        """Sums [n * m], of which each of n ranks adds m; else as above."""
        if self.num_ranks == 2 or x.numel() % self.num_ranks:
            self._sum_gathered(x)
            return
        parts = x.new_empty(self.num_ranks, x.numel() // self.num_ranks)
        self._do(lambda backend: backend.alltoall_base(parts.view(-1), x.view(-1), [], []))
        mine = torch.empty_like(parts[0])
        add_in_order(list(parts), mine)
        self._gather(x, mine)

    def _reduce_rows(self, update: Tensor, finish: Finish) -> None:
        """Sums [n * m, E], of which each of n ranks adds and finishes m rows, and is given what others made of theirs.

        Reduce-scatter, residual, norm and all-gather (TokenWeave, Gond et al. 2025): see
        :mod:`kernels.cpu.layers.partial`.
        """
        share = len(update) // self.num_ranks
        own = slice(self.rank * share, (self.rank + 1) * share)
        parts = update.new_empty(self.num_ranks, share, *update.shape[1:])
        self._do(lambda backend: backend.alltoall_base(parts.view(-1), update.view(-1), [], []))
        add_in_order(list(parts), update[own])
        finish.rows(own.start, own.stop)
        self._gather(finish.result.view(-1), finish.result[own].clone().view(-1))

    def _gather(self, into: Tensor, mine: Tensor) -> None:
        # Views that nobody else has: a thread of the backend lets go of them without the interpreter's lock.
        self._do(lambda backend: backend._allgather_base(into.view(-1), mine.view(-1)))

    def _running(self) -> Backend:
        """Raises PeerFailed where the group has ended."""
        self._pulse.check()
        if self._backend is None:
            raise PeerFailed(self._other, "the connection with it was ended here")
        return self._backend

    def _do(self, begin: Callable[[Backend], Work]) -> None:
        """Raises PeerFailed; the group has ended then."""
        backend = self._running()
        try:
            work = self._last = begin(backend)
        except RuntimeError as error:  # of NCCL, which looks at its connections then
            raise self._broken(error) from error
        self._deadline_s = time.monotonic() + COLLECTIVE_S
        try:
            self._finish(work)
        except PeerFailed:
            self._backend = None
            self._end(backend, work)  # whoever has closed it meanwhile may not have known of this work
            raise

    @property
    def _other(self) -> int:
        """Some other rank, for want of a better name."""
        return self._members[0 if self.rank else -1]

    def _look(self) -> None:
        """Whether to wait on. Raises PeerFailed."""
        self._running()
        if time.monotonic() >= self._deadline_s:
            raise PeerFailed(self._other, "did not answer in time")

    def _broken(self, error: RuntimeError) -> PeerFailed:
        """Which rank it was that a backend failed for, as far as the pulse comes to know it."""
        until_s = time.monotonic() + _CAUSE_S
        while self._pulse.lost is None and self._backend is not None and time.monotonic() < until_s:
            time.sleep(LOOK_S / 10)
        lost = self._pulse.lost
        if lost is not None:
            return PeerFailed(lost.rank, lost.cause)
        return PeerFailed(self._other, f"its connection broke ({str(error).splitlines()[0]})")

    @abstractmethod
    def _finish(self, work: Work) -> None:
        """Waits for work where the computation is done: on the host, or on its stream. Raises PeerFailed."""

    @abstractmethod
    def _end(self, backend: Backend, last: Work | None) -> None:
        """Ends the backend, whose ``last`` work may hang. Does not wait for that."""
