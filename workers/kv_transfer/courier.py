"""A thread that sends keys and values to one rank of another replica, layer by layer as steps write them."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from placement.errors import HeterodyneError, InvalidRequest
from placement.model.part import Span
from placement.serving.kv.portions import PortionLayouts
from protos.codec.log_record import said
from workers.kv_transfer.outbound import Outbound, Unreachable
from workers.kv_transfer.packing import MessagePlaces
from workers.kv_transfer.wire import Hello, Piece
from workers.model.progress import LayerProgress

logger = logging.getLogger(__name__)

_CHECK_S = 0.1
_IDLE_CHECK_S = 1.0
_IDLE_S = 30.0
# A target that cannot be reached is tried again for so long.
_REACH_S = 6.0
_RETRY_S = 0.1
_END_S = 10.0


class Opened:
    """An open transfer, as the threads know it that send parts of it.

    Attributes:
        layouts: what goes to whom.
        problem: why it was closed; "" while it is open.
    """

    def __init__(self, transfer_id: bytes, layouts: PortionLayouts) -> None:
        self.transfer_id = transfer_id
        self.layouts = layouts
        self.problem = ""
        self._lock = threading.Lock()
        self._is_open = True

    def is_open(self) -> bool:
        """Tells whether more may be sent of it."""
        with self._lock:
            return self._is_open

    def close(self, problem: str) -> None:
        """Closes it."""
        with self._lock:
            self._is_open, self.problem = False, problem


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """A portion that goes to one target rank.

    Attributes:
        layers: the layers of the model that go, of which ``next_layer`` is the next.
        first_layer: the source rank's first layer.
        places: where its keys and values lie.
    """

    opened: Opened
    portion: Span
    layers: Span
    first_layer: int
    progress: LayerProgress
    make_places: Callable[[], MessagePlaces]
    next_layer: int = field(init=False)
    _places: MessagePlaces | None = None

    def __post_init__(self) -> None:
        self.next_layer = self.layers.start

    def places(self) -> MessagePlaces:
        """Returns where its keys and values lie, which takes a while the first time."""
        if self._places is None:
            self._places = self.make_places()
        return self._places


class _Stopped(Exception):
    """The thread is to end."""


class Courier:
    """Sends to one target rank, over one connection, which is opened when there is something to send."""

    def __init__(
        self,
        address: tuple[str, int],
        hello: Hello,
        *,
        drop: Callable[[Opened, str], None],
        sent: Callable[[int], None],
    ) -> None:
        """Starts the thread.

        Args:
            address: where the target rank listens.
            hello: what this rank says there.
            drop: is called where a transfer cannot go on, with the problem, on this thread with no lock held.
            sent: is called with the bytes that were sent.
        """
        self._address = address
        self._hello = hello
        self._drop = drop
        self._sent = sent
        self._changed = threading.Condition()
        self._jobs: list[Job] = []
        self._notices: list[Opened] = []
        self._touched: dict[bytes, Opened] = {}  # transfers of which something went over the connection
        self._connection: Outbound | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._stopped = False
        self.has_ended = False
        self._thread = threading.Thread(target=self._run, name=f"kv-to-{hello.target_rank}", daemon=True)
        self._thread.start()

    def put(self, jobs: list[Job]) -> bool:
        """Queues jobs, unless the thread has ended for want of some. Returns whether they are queued."""
        return self._queue(lambda: self._jobs.extend(jobs))

    def notify(self, opened: Opened) -> bool:
        """Queues word for the target that a transfer has failed. Returns as :meth:`put` does."""
        return self._queue(lambda: self._notices.append(opened))

    def _queue(self, append: Callable[[], None]) -> bool:
        with self._changed:
            if not self.has_ended:
                append()
                self._changed.notify_all()
            return not self.has_ended

    def owes(self, opened: Opened) -> bool:
        """Tells whether something of a transfer is still to be sent."""
        with self._changed:
            return any(job.opened is opened for job in self._jobs)

    def stop(self) -> None:
        """Has the thread end; it ends within a moment."""
        with self._changed:
            self._stopped = self.has_ended = True
            self._changed.notify_all()

    def join(self) -> None:
        """Waits until the thread has ended."""
        if self._thread is not threading.current_thread():
            self._thread.join(_END_S)

    def _alive(self) -> None:
        if self._stopped:
            raise _Stopped

    def _run(self) -> None:
        try:
            idle_since_s = time.monotonic()
            while not self._is_done(idle_since_s):
                if self._turn():
                    idle_since_s = time.monotonic()
        except _Stopped:
            pass
        finally:
            with self._changed:
                self.has_ended = True
            if self._connection is not None:
                self._connection.close()

    def _is_done(self, idle_since_s: float) -> bool:
        """Tells whether the thread is to end, because it was stopped or has long had nothing to do."""
        with self._changed:
            is_idle = not self._jobs and not self._notices and not self._touched
            if is_idle and time.monotonic() - idle_since_s >= _IDLE_S:
                self.has_ended = True
            return self.has_ended

    def _turn(self) -> bool:
        """Does one thing, and whatever comes of it, goes on with other transfers. Returns whether it was done."""
        try:
            return self._advance()
        except _Stopped:
            raise
        except HeterodyneError as error:
            self._break(f"the connection broke ({error})")
        except Exception as error:  # the border of a thread: nobody else would tell of it
            logger.exception("Sending keys and values failed.", extra=said("kv_sending_failed"))
            self._begin_all()
            self._break(f"sending failed ({type(error).__name__}: {error})")
        return False

    def _advance(self) -> bool:
        """Does the next thing that there is to do, or waits a moment. Returns whether something was done."""
        self._hear()
        with self._changed:
            notice = self._notices.pop(0) if self._notices else None
            job = self._next_job()
            if notice is None and job is None:
                self._changed.wait(_CHECK_S if self._touched else _IDLE_CHECK_S)
                return False
        if notice is not None:
            self._connected().fail(notice.transfer_id, notice.problem)
            return True
        assert job is not None
        if job.progress.wait(job.next_layer - job.first_layer, _CHECK_S):
            self._send(job)
        elif job.progress.has_failed:
            self._drop(job.opened, "the step that computes it failed")
        return True

    def _next_job(self) -> Job | None:
        """Returns the job whose next layer is written first: of the oldest step, the first of those least far."""
        self._jobs = [job for job in self._jobs if job.opened.is_open()]
        self._touched = {key: opened for key, opened in self._touched.items() if opened.is_open()}
        same_step = [job for job in self._jobs if job.progress is self._jobs[0].progress]
        return min(same_step, key=lambda job: job.next_layer, default=None)

    def _hear(self) -> None:
        """Takes the target's answers."""
        if self._connection is not None:
            for transfer_id in self._connection.hear():
                opened = self._touched.get(transfer_id)
                if opened is not None:
                    self._drop(opened, "the target does not await it")

    def _send(self, job: Job) -> None:
        """Sends a job's next layer."""
        layer, opened = job.next_layer, job.opened
        try:
            places = job.places()
        except InvalidRequest as error:
            self._drop(opened, str(error))
            return
        num_bytes = places.num_bytes(layer)
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        memory = self._memory[:num_bytes]
        places.of(layer).pack(memory)
        connection = self._connected()
        # What was copied before this is of the transfer: its blocks are not given away before it is closed.
        if not opened.is_open():
            return
        self._touched[opened.transfer_id] = opened
        piece = Piece.of(opened.transfer_id, layer, job.portion, 0, num_bytes)
        connection.send_layer(piece, memory.numpy().data)
        self._sent(num_bytes)
        job.next_layer += 1
        if job.next_layer >= job.layers.stop:
            with self._changed:
                self._jobs.remove(job)

    def _connected(self) -> Outbound:
        """Returns the connection, which is opened where there is none. Raises PeerFailed and BadFrame."""
        deadline_s = time.monotonic() + _REACH_S
        while self._connection is None:
            self._alive()
            try:
                self._connection = Outbound.connect(self._address, self._hello, self._alive)
            except HeterodyneError as error:
                if not isinstance(error, Unreachable) or time.monotonic() >= deadline_s:
                    self._forget()
                    raise
                with self._changed:
                    self._changed.wait(_RETRY_S)
        return self._connection

    def _forget(self) -> None:
        """Forgets what a target that cannot be reached is to be told, and has :meth:`_break` give up all transfers."""
        self._begin_all()
        with self._changed:
            self._notices.clear()

    def _begin_all(self) -> None:
        """Takes all transfers that are to be sent for begun, so that they end with the connection."""
        with self._changed:
            self._touched |= {job.opened.transfer_id: job.opened for job in self._jobs}

    def _break(self, problem: str) -> None:
        """Gives a broken connection up, and with it the transfers of which something went over it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        touched, self._touched = list(self._touched.values()), {}
        for opened in touched:
            self._drop(opened, problem)
