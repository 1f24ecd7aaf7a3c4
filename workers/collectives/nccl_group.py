"""All-reduce by NCCL, for tensors on GPUs: see :mod:`workers.collectives.torch_group`."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from kernels.cpu.layers.partial import Partial
from workers.collectives.torch_group import Backend, TorchGroup, Work
from workers.transport.errors import PeerFailed
from workers.transport.pulse import Pulse

_CHECK_S = 5e-5


class NcclGroup(TorchGroup):
    """A group of ranks that reduces tensors on GPUs by NCCL; each rank has a GPU of its own.

    The stream that needs a sum waits for it. The host waits once a step, in :meth:`settle`: a rank that is lost leaves
    a kernel that never ends, and a plain wait for the device would hang with it. Only the thread that learns of the
    loss aborts the communicator, so that nothing computes on with the incomplete result of an aborted sum.
    """

    def __init__(
        self, *, backend: Backend, rank: int, members: Sequence[int], pulse: Pulse, widths: Sequence[int]
    ) -> None:
        super().__init__(backend=backend, rank=rank, members=members, pulse=pulse, widths=widths)
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def begin_reduce(self, partial: Partial) -> Future[None]:
        """Runs :meth:`reduce` on a stream beside the computation's. A stream that asks for the result waits for it."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self.reduce(partial)
            tensors = [partial.update] if partial.finish is None else [partial.update, partial.finish.result]
            for x in tensors:
                x.record_stream(self._side)
            return StreamFuture(self._side.record_event())

    def settle(self) -> None:
        """Blocks the host until all sums are there. Raises PeerFailed."""
        torch.cuda.current_stream().wait_stream(self._side)
        event = torch.cuda.current_stream().record_event()
        self._deadline_s = time.monotonic() + self._limit_s
        try:
            while not event.query():
                self._check()
                time.sleep(_CHECK_S)
        except PeerFailed:
            self.close()
            raise

    def _finish(self, work: Work) -> None:
        try:
            work.wait()  # the stream waits, not the host
        except RuntimeError as error:
            raise self._broken(error) from error

    def _end(self, backend: Backend, last: Work | None) -> None:
        is_done = last is None or last.is_completed()
        end = backend.shutdown if is_done else backend.abort
        threading.Thread(target=end, name="nccl-end", daemon=True).start()


class StreamFuture(Future[None]):
    """A future of what a stream computes: asking for the result has the current stream wait, not the thread."""

    def __init__(self, event: torch.cuda.Event) -> None:
        super().__init__()
        self._event = event
        self.set_result(None)

    def result(self, timeout: float | None = None) -> None:
        """Has the current stream wait for the event."""
        torch.cuda.current_stream().wait_event(self._event)
