"""A stage's ranks that sum by gloo: see :mod:`workers.collectives.torch_group`."""

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
from workers.collectives.torch_group import LOOK_S, Backend, TorchGroup, Work
from workers.transport.pulse import Pulse

# What gloo was seen to add, of two, with the bits of our own sums.
_ROUNDED_ONCE = (torch.float32, torch.bfloat16, torch.float16)


class GlooGroup(TorchGroup):
    """Of tensors on the host."""

    def __init__(
        self, *, backend: Backend, rank: int, members: Sequence[int], pulse: Pulse, widths: Sequence[int]
    ) -> None:
        super().__init__(backend=backend, rank=rank, members=members, pulse=pulse, widths=widths)
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="gloo", initializer=work_alone)

    def begin_reduce(self, partial: Partial) -> Future[None]:
        """The same beside the computation, after what was begun before. Raises PeerFailed in the future."""
        return self._beside.submit(self._reduce_beside, partial)

    @torch.inference_mode()  # the step's tensors were made in it, and each thread has its own
    def _reduce_beside(self, partial: Partial) -> None:
        self.reduce(partial)

    def settle(self) -> None:
        """They are, once they were waited for."""

    def _sum_large(self, x: Tensor) -> None:
        """Sums [m]."""
        if self.num_ranks == 2 and x.dtype in _ROUNDED_ONCE:
            self._do(lambda backend: backend.allreduce([x.view(-1)]))
        else:
            super()._sum_large(x)

    def _finish(self, work: Work) -> None:
        while not work.is_completed():
            with contextlib.suppress(RuntimeError):  # the slice is over, or the work has failed: it tells below
                work.wait(timedelta(seconds=LOOK_S))
            if not work.is_completed():
                self._look()
        try:
            work.wait()
        except RuntimeError as error:
            raise self._broken(error) from error

    def _end(self, backend: Backend, last: Work | None) -> None:
        self._beside.shutdown(wait=False)
        if last is None or last.is_completed():
            backend.shutdown()
        else:
            threading.Thread(target=_hold, args=(backend, last), name="gloo-end", daemon=True).start()


def _hold(backend: Backend, work: Work) -> None:
    """Keeps a backend until its work has ended: to destroy it takes as long, and would hold up who lets go of it.

    It looks, rather than to wait within the backend: the process may end meanwhile.
    """
    while not work.is_completed():
        time.sleep(LOOK_S)
    backend.shutdown()
