"""The loop of a rank that follows a leader: one thread receives steps and lays them out, another computes them."""

import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from google.protobuf.message import DecodeError

from placement.errors import cause_of
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.step.layout import Prepared
from workers.step.types import Batch
from workers.step.wire import step_batch
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, receive
from workers.transport.pulse import Pulse

logger = logging.getLogger(__name__)

# Steps that may be laid out and not yet computed: no fewer than a leader dispatches ahead.
_MOST_AHEAD = 64
_CHECK_S = 0.1


class PreparedSteps:
    """Hands laid-out steps, by number, from the thread that receives them to the one that computes them."""

    def __init__(self, alive: Callable[[], None]) -> None:
        """``alive`` is called again and again during waits, and raises what ends them."""
        self._alive = alive
        self._steps: dict[int, Prepared] = {}
        self._changed = threading.Condition()

    def put(self, number: int, step: Prepared) -> None:
        """Adds a step, and waits for room where too many are there."""
        self._wait(lambda: len(self._steps) < _MOST_AHEAD)
        with self._changed:
            self._steps[number] = step
            self._changed.notify_all()

    def get(self, number: int) -> Prepared:
        """Waits for the step of that number and returns it. The step stays until :meth:`drop`."""
        self._wait(lambda: number in self._steps)
        return self._steps[number]

    def drop(self, number: int) -> None:
        """Removes a step that is computed."""
        with self._changed:
            del self._steps[number]
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            while not self._changed.wait_for(condition, _CHECK_S):
                self._alive()


class StageTask(Protocol):
    """What a rank computes for every step, according to its stage. For the thread that computes."""

    def run_next(self, steps: PreparedSteps, alive: Callable[[], None]) -> None:
        """Waits until something is to be computed, and computes it. Raises PeerFailed, and what ``alive`` raises."""


class Layout(Protocol):
    """What a follower needs of a runner: it lays out steps."""

    def lay_out(self, batch: Batch) -> Prepared:
        """Lays out a batch."""


class Follower:
    """A rank that computes the steps that its leader announces.

    Attributes:
        failure: why the loop has ended, where nobody stopped it; whatever it is, the replica has failed.
        ended: is done when the loop has ended.
        num_steps: how many steps were received.
        thread: runs the loop; whoever makes the follower starts it.
    """

    def __init__(
        self,
        *,
        runner: Layout,
        task: StageTask,
        leader: Link,
        pulse: Pulse,
        executor: ThreadPoolExecutor,
        vocab_size: int,
        slot_limit: int,
        wait_at_most: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Makes the loop; whoever makes it starts ``thread``.

        Args:
            leader: the STEPS link to the leader.
            executor: has the one thread that computes.
            wait_at_most: is told how long this rank may wait for others, where the leader says so.
        """
        self._wait_at_most = wait_at_most
        self._runner = runner
        self._task = task
        self._leader = leader
        self._pulse = pulse
        self._executor = executor
        self._vocab_size = vocab_size
        self._slot_limit = slot_limit
        self._stopping = threading.Event()
        self._compute_failure: BaseException | None = None
        self._steps = PreparedSteps(self._alive)
        self.failure: BaseException | None = None
        self.ended: Future[None] = Future()
        self.num_steps = 0
        self.thread = threading.Thread(target=self.run, name="follower", daemon=True)

    def stop(self) -> None:
        """Has the loop end; a computation that runs is finished first."""
        self._stopping.set()

    def run(self) -> None:
        """Receives and lays out steps until :meth:`stop`, or until something fails, which ``failure`` then says."""
        computing = self._executor.submit(self._compute)
        try:
            while True:
                number, batch = self.num_steps, self._receive()
                self._steps.put(number, self._runner.lay_out(batch))
        except _Stopped:
            pass
        except BaseException as error:  # the border of the thread: whatever it was, the replica has failed
            self.failure = error
            extra = said("follower_failed", cause=cause_of(error))
            if isinstance(error, PeerFailed):  # expected in operation, and that rank's own end says more
                logger.debug("This rank ends, as another was lost.", extra=extra)
            else:
                logger.exception("This rank failed: %s", cause_of(error), extra=extra)
            self._pulse.fail(cause_of(error))
        finally:
            computing.cancel()
            self.ended.set_result(None)
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _receive(self) -> Batch:
        """Receives the leader's next step, however long that takes. Raises PeerFailed and BadFrame."""
        try:
            payload = receive(self._leader, Kind.STEP, deadline_s=math.inf, alive=self._alive)
            message = pb.Step.FromString(bytes(payload))
        except PeerFailed as error:
            raise self._pulse.reason(error) from error
        except DecodeError as error:
            raise BadFrame("a STEP frame holds no step") from error
        if message.wait_s > 0:
            self._wait_at_most(message.wait_s)
        number, self.num_steps = self.num_steps, self.num_steps + 1
        return step_batch(message, number=number, vocab_size=self._vocab_size, slot_limit=self._slot_limit)

    def _alive(self) -> None:
        """Raises what ends a wait: a stop, the failure of the thread that computes, or the loss of a rank."""
        if self._stopping.is_set() or self.failure is not None:
            raise _Stopped
        if self._compute_failure is not None:
            raise self._compute_failure
        self._pulse.check()

    def _compute(self) -> None:
        """Computes steps until something ends it; on the thread that computes."""
        try:
            while True:
                self._task.run_next(self._steps, self._alive)
        except _Stopped:
            return
        except PeerFailed as error:
            self._compute_failure = self._pulse.reason(error)
        except BaseException as error:
            self._compute_failure = error


class _Stopped(Exception):
    """This rank was told to stop, or has failed on its other thread."""
