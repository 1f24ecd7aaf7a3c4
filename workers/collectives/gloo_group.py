"""All-reduce by gloo, for tensors on the host: see :mod:`workers.collectives.torch_group`."""

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import torch
from torch import Tensor

from kernels.cpu.layers.partial import Partial
from kernels.cpu.machine.threads import work_alone
from workers.collectives.torch_group import CHECK_S, Backend, TorchGroup, Work
from workers.transport.pulse import Pulse

# The number types in which gloo's sums of two ranks were found to have the same bits as our own.
_ROUNDED_ONCE = (torch.float32, torch.bfloat16, torch.float16)


class GlooGroup(TorchGroup):
    """A group of ranks that reduces tensors on the host by gloo."""

    def __init__(
        self, *, backend: Backend, rank: int, members: Sequence[int], pulse: Pulse, widths: Sequence[int]
    ) -> None:
        super().__init__(backend=backend, rank=rank, members=members, pulse=pulse, widths=widths)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="gloo", initializer=work_alone)

    def begin_reduce(self, partial: Partial) -> Future[None]:
        """Runs :meth:`reduce` in the background, after what was begun before. The future raises PeerFailed."""
        return self._background.submit(self._reduce_in_background, partial)

    @torch.inference_mode()  # as the step's tensors were made in it; each thread has its own mode
    def _reduce_in_background(self, partial: Partial) -> None:
        self.reduce(partial)

    def settle(self) -> None:
        """Does nothing: a sum is there once its future is done."""

    def _sum_large(self, x: Tensor) -> None:
        """Sums a large tensor [m] over the ranks, in place."""
        if self.num_ranks == 2 and x.dtype in _ROUNDED_ONCE:
            self._run(lambda backend: backend.allreduce([x.view(-1)]))
        else:
            super()._sum_large(x)

    def _finish(self, work: Work) -> None:
        while not work.is_completed():
            with contextlib.suppress(
                RuntimeError
            ):  # the time is over, or the collective has failed, which the wait below raises
                work.wait(timedelta(seconds=CHECK_S))
            if not work.is_completed():
                self._check()
        try:
            work.wait()
        except RuntimeError as error:
            raise self._broken(error) from error

    def _end(self, backend: Backend, last: Work | None) -> None:
        self._background.shutdown(wait=False)
        if last is None or last.is_completed():
            backend.shutdown()
        else:
            threading.Thread(target=_hold, args=(backend, last), name="gloo-end", daemon=True).start()


def _hold(backend: Backend, work: Work) -> None:
    """Keeps a backend until its last collective has ended, since destroying it would block for as long.

    It polls instead of waiting within the backend, since the process may end meanwhile.
    """
    while not work.is_completed():
        time.sleep(CHECK_S)
    backend.shutdown()
