"""A stage's ranks that sum by NCCL: see :mod:`workers.collectives.torch_group`."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from kernels.cpu.layers.partial import Partial
from workers.collectives.group import COLLECTIVE_S
from workers.collectives.torch_group import Backend, TorchGroup, Work
from workers.transport.errors import PeerFailed
from workers.transport.pulse import Pulse

_LOOK_S = 5e-5


class NcclGroup(TorchGroup):
    """Of tensors on GPUs, each rank with one of its own.

    A sum is waited for by the stream that needs it. The host does so once a step, by :meth:`settle`: a rank that is
    lost leaves a kernel that never ends, and whatever waited for the device without looking would hang with it. The
    communicator is aborted by the thread that was told of the loss alone, so that nothing goes on with what an aborted
    sum left.
    """

    def __init__(
        self, *, backend: Backend, rank: int, members: Sequence[int], pulse: Pulse, widths: Sequence[int]
    ) -> None:
        super().__init__(backend=backend, rank=rank, members=members, pulse=pulse, widths=widths)
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def begin_reduce(self, partial: Partial) -> Future[None]:
        """The same on a stream beside the computation's. The future has the stream wait that asks for its result."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            self.reduce(partial)
            used = [partial.update] if partial.finish is None else [partial.update, partial.finish.result]
            for x in used:
                x.record_stream(self._side)
            return StreamFuture(self._side.record_event())

    def settle(self) -> None:
        """Waits until all sums are there, on the host too. Raises PeerFailed."""
        torch.cuda.current_stream().wait_stream(self._side)
        event = torch.cuda.current_stream().record_event()
        self._deadline_s = time.monotonic() + COLLECTIVE_S
        try:
            while not event.query():
                self._look()
                time.sleep(_LOOK_S)
        except PeerFailed:
            self.close()
            raise

    def _finish(self, work: Work) -> None:
        try:
            work.wait()  # of the stream
        except RuntimeError as error:
            raise self._broken(error) from error

    def _end(self, backend: Backend, last: Work | None) -> None:
        is_done = last is None or last.is_completed()
        end = backend.shutdown if is_done else backend.abort
        threading.Thread(target=end, name="nccl-end", daemon=True).start()


class StreamFuture(Future[None]):
    """Done when an event of a stream is: the stream that asks for the result waits, not the thread."""

    def __init__(self, event: torch.cuda.Event) -> None:
        super().__init__()
        self._event = event
        self.set_result(None)

    def result(self, timeout: float | None = None) -> None:
        """Has the current stream wait."""
        torch.cuda.current_stream().wait_event(self._event)
