"""Offers the engine of a replica's leader to other threads, and runs its loop on a thread of its own."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from placement.errors import cause_of
from placement.serving.admission import draining
from placement.serving.events import Ended, EndReason, LoadSnapshot
from placement.serving.replica import ReplicaCore
from protos.codec.log_record import said
from workers.engine.inbox import Abandoned, Cancelled, DrainAsked, KvCame, KvTaken, Message, Observing, Submitted, Woken
from workers.engine.loop import Loop
from workers.engine.types import STOPS, KvExchange, Output, Runner, Sink, StepStats, Stopping, Submission
from workers.transport.errors import PeerFailed

logger = logging.getLogger(__name__)


class Engine:
    """Serves sequences until stopped.

    Args:
        runner: computes a batch and samples; only this engine calls it.
        core: decides what happens next.
        executor: executes the steps on one thread; in a pipeline on one thread for each step that is on its way and one
            for the next. The engine shuts it down when it ends.
        clock: returns the seconds of a monotonic clock.

    Attributes:
        runner: what it was given; for measurements, while it does not run.
        executor: likewise.
        failure: the exception that a step raised, or None; whatever is submitted after it ends at once with that cause.
        stop_cause: why the engine stops, where :meth:`stop` was called.
        ended: is done once the engine has left its loop, for whatever reason, and has answered all that was submitted
            until then. A step may still execute at that moment: ``thread`` ends after it.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        core: ReplicaCore,
        executor: ThreadPoolExecutor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = core.settings.limits
        self._core = core
        self._clock = clock
        self.runner = runner
        self.executor = executor
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._loop = Loop(runner=runner, core=core, executor=executor, inbox=self._inbox, clock=clock)
        self._draining = False
        self._stopping = False
        self._closed = False
        self.stop_cause = STOPS
        self.failure: BaseException | None = None
        self.ended: Future[None] = Future()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    # -- any thread -----------------------------------------------------------------------------------------------

    @property
    def load(self) -> LoadSnapshot:
        """Returns the figures that the loop last took between two steps."""
        return self._loop.load

    def admit(self) -> None:
        """Checks that the engine takes new sequences. An admitted one may be submitted later, even after a drain.

        Raises:
            Draining: this replica takes no new sequences.
        """
        if self._draining:
            raise draining()

    def drain(self) -> None:
        """Makes the engine finish what was admitted before, and admit nothing from now on."""
        self._draining = True
        self._inbox.put(DrainAsked())

    def submit(self, sink: Sink, sequence_id: int, submission: Submission) -> None:
        """Hands over a sequence that was admitted. ``sink`` receives the answer: outputs, or a refusal."""
        self._inbox.put(Submitted(sink=sink, sequence_id=sequence_id, submission=submission, at_s=self._clock()))
        # This is read after the put, and the inbox is emptied after it is set: one of both threads finds the message.
        if self._closed:
            self._answer_inbox()

    def cancel(self, sink: Sink, sequence_id: int) -> None:
        """Ends a sequence before the next step, unless it has ended already."""
        self._inbox.put(Cancelled(sink=sink, sequence_id=sequence_id))

    def abandon(self, sink: Sink) -> None:
        """Ends everything that a sink submitted, and tells the sink, which is gone, nothing more."""
        self._inbox.put(Abandoned(sink=sink))

    def observe(self, sink: Sink) -> None:
        """Has a sink hear of every step that computes something, whoever it computes for, until it abandons."""
        self._inbox.put(Observing(sink=sink))

    def use(self, exchange: KvExchange) -> None:
        """Sets what exchanges keys and values with other replicas. Call it before the thread is started."""
        self._loop.moves.exchange = exchange

    def kv_came(self, message: KvCame) -> None:
        """Tells that keys and values came from another replica, or will not come: see :class:`KvExchange`."""
        self._inbox.put(message)

    def kv_taken(self, sink: Sink, sequence_id: int, *, lapsed: bool = False) -> None:
        """Tells that another replica has all keys and values of a sequence, or that its lease to take them is over."""
        self._inbox.put(KvTaken(sink=sink, sequence_id=sequence_id, lapsed=lapsed))

    def stop(self, cause: str = STOPS) -> None:
        """Makes the engine leave its loop, whatever waits or executes. Sequences that have not ended by then fail."""
        if not self._stopping:
            self.stop_cause = cause
        self._stopping = True
        self._inbox.put(Woken())

    # -- the engine's thread --------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs the loop. Returns after ``stop``, or with ``failure`` set when a step raised."""
        try:
            self._loop.run(lambda: self._stopping)
            self._end_all(Stopping(self.stop_cause))
        except BaseException as error:  # the border of the thread: whatever it was, every sequence must end
            _log_failure(error)
            self.failure = error
            self._end_all(error)
        finally:
            self.ended.set_result(None)
            self.executor.shutdown(cancel_futures=True)

    def _end_all(self, cause: BaseException) -> None:
        """Ends every sequence with the cause, after the loop was left; the engine takes no more."""
        self._closed = True
        sequences, detail = self._loop.sequences, cause_of(cause)
        endings = [Ended(sequence_id=key, reason=EndReason.FAILED, detail=detail) for key in sequences.by_core_id]
        try:
            sequences.end(endings, self._core.num_ended_steps)
        finally:
            self._answer_inbox()
        if self.failure is None:  # else the core may be in disorder
            self._loop.end(detail)

    def _answer_inbox(self) -> None:
        """Answers every submission in the inbox. Any thread may call it: who takes a message out answers it."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if not isinstance(message, Submitted):
                continue
            if self.failure is None:
                message.sink.refused(message.sequence_id, Stopping(self.stop_cause))
            else:
                detail = cause_of(self.failure)
                failed = Output(sequence_id=message.sequence_id, end=EndReason.FAILED, detail=detail)
                message.sink.step(StepStats(step=self._core.num_ended_steps), [failed])


def _log_failure(error: BaseException) -> None:
    """Logs what ended the engine. Another rank's loss is expected in operation, and needs no traceback."""
    extra = said("engine_failed", cause=cause_of(error))
    if isinstance(error, PeerFailed):
        logger.debug("The engine ends, as another rank was lost.", extra=extra)
    else:
        logger.error("The engine failed: %s", cause_of(error), exc_info=error, extra=extra)
