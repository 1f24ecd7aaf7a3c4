"""The loop of a rank that follows a leader: one thread takes and lays out steps, another computes them."""

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from google.protobuf.message import DecodeError

from placement.errors import cause_of
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.step.layout import Prepared
from workers.step.types import Batch
from workers.step.wire import step_batch
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, receive
from workers.transport.pulse import Pulse

logger = logging.getLogger(__name__)

# Steps that are laid out and not computed: no fewer than a leader dispatches ahead.
_MOST_AHEAD = 64
_LOOK_S = 0.1


class LaidOut:
    """Steps that are laid out, by number, from the thread that takes them to the one that computes them."""

    def __init__(self, alive: Callable[[], None]) -> None:
        """``alive`` raises what ends a wait."""
        self._alive = alive
        self._steps: dict[int, Prepared] = {}
        self._changed = threading.Condition()

    def put(self, number: int, step: Prepared) -> None:
        """Adds a step, once there is room for it."""
        self._wait(lambda: len(self._steps) < _MOST_AHEAD)
        with self._changed:
            self._steps[number] = step
            self._changed.notify_all()

    def get(self, number: int) -> Prepared:
        """The step of that number, once it is there. It stays."""
        self._wait(lambda: number in self._steps)
        return self._steps[number]

    def drop(self, number: int) -> None:
        """A step that is computed."""
        with self._changed:
            del self._steps[number]
            self._changed.notify_all()

    def _wait(self, true: Callable[[], bool]) -> None:
        with self._changed:
            while not self._changed.wait_for(true, _LOOK_S):
                self._alive()


class Duty(Protocol):
    """What a rank does, again and again, on the thread that computes."""

    def do(self, steps: LaidOut, alive: Callable[[], None]) -> None:
        """The next piece of work, once it comes. Raises PeerFailed, and what ``alive`` raises."""


class Layout(Protocol):
    """Lays out steps."""

    def lay_out(self, batch: Batch) -> Prepared: ...


class Follower:
    """A rank that does what its leader says.

    Attributes:
        failure: why it has ended, where nobody stopped it: whatever it is, the replica has failed.
        ended: done when it has.
    """

    def __init__(
        self,
        *,
        runner: Layout,
        duty: Duty,
        leader: Link,
        pulse: Pulse,
        executor: ThreadPoolExecutor,
        vocab_size: int,
        slot_limit: int,
    ) -> None:
        """``leader`` is the STEPS link to it; ``executor`` has the one thread that computes, and ends with this."""
        self._runner = runner
        self._duty = duty
        self._leader = leader
        self._pulse = pulse
        self._executor = executor
        self._vocab_size = vocab_size
        self._slot_limit = slot_limit
        self._stopping = threading.Event()
        self._compute_failure: BaseException | None = None
        self._steps = LaidOut(self._alive)
        self.failure: BaseException | None = None
        self.ended: Future[None] = Future()
        self.num_steps = 0
        self.thread = threading.Thread(target=self.run, name="follower", daemon=True)

    def stop(self) -> None:
        """Leave the loop; what computes goes on to the end of its piece of work."""
        self._stopping.set()

    def run(self) -> None:
        """The loop. Ends after ``stop``, or with ``failure`` set."""
        computing = self._executor.submit(self._compute)
        try:
            while True:
                number, batch = self.num_steps, self._take()
                self._steps.put(number, self._runner.lay_out(batch))
        except _Stopped:
            pass
        except BaseException as error:  # the border of the thread: whatever it was, the replica has failed
            self.failure = error
            if isinstance(error, PeerFailed):
                logger.error('follower_failed cause="%s"', cause_of(error))
            else:
                logger.exception("follower_failed")
            self._pulse.fail(cause_of(error))
        finally:
            computing.cancel()
            self.ended.set_result(None)
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> Batch:
        """The next step of the leader, however long that takes."""
        try:
            payload = receive(self._leader, Kind.STEP, deadline_s=math.inf, alive=self._alive)
            message = pb.Step.FromString(bytes(payload))
        except PeerFailed as error:
            raise self._pulse.reason(error) from error
        except DecodeError as error:
            raise BadFrame("a STEP frame holds no step") from error
        number, self.num_steps = self.num_steps, self.num_steps + 1
        return step_batch(message, number=number, vocab_size=self._vocab_size, slot_limit=self._slot_limit)

    def _alive(self) -> None:
        """What ends a wait: a stop, the failure of the thread that computes, the loss of a rank."""
        if self._stopping.is_set() or self.failure is not None:
            raise _Stopped
        if self._compute_failure is not None:
            raise self._compute_failure
        self._pulse.check()

    def _compute(self) -> None:
        """On the executing thread."""
        try:
            while True:
                self._duty.do(self._steps, self._alive)
        except _Stopped:
            return
        except PeerFailed as error:
            self._compute_failure = self._pulse.reason(error)
        except BaseException as error:
            self._compute_failure = error


class _Stopped(Exception):
    """This rank was told to stop, or has failed elsewhere."""
