"""Runs the engine's loop: it takes messages, dispatches the next step and collects the last.

:class:`placement.serving.replica.ReplicaCore` decides what happens next; the loop has the clock, the executor and the
sinks. It dispatches a step while the one before it executes, so that the device never waits for planning, laying out
or answering (overlapped scheduling).

The loop waits for one thing only, the inbox, where the end of a step arrives too: a step that never ends holds up no
message, and no stop.
"""

import queue
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from placement.errors import HeterodyneError, cause_of
from placement.serving.events import (
    Cancel,
    Command,
    Drain,
    Ended,
    EndReason,
    Event,
    KvLost,
    LoadSnapshot,
    Refused,
    Run,
    StepDue,
    StepEnded,
    StepLost,
    Submit,
    Tell,
)
from placement.serving.replica import ReplicaCore
from placement.serving.step_plan import StepPlan
from workers.engine.answers import advances, step_outputs
from workers.engine.batch import make_batch
from workers.engine.inbox import (
    Abandoned,
    Cancelled,
    DrainAsked,
    KvCame,
    KvTaken,
    Message,
    Observing,
    Submitted,
    Woken,
)
from workers.engine.moves import Moves
from workers.engine.pacing import Pace
from workers.engine.recovery import Recovery
from workers.engine.sequence import begin
from workers.engine.sequences import EngineSequences
from workers.engine.types import Runner, Sink, StepStats
from workers.step.types import StepResult
from workers.transport.errors import KvGone

# Where there is nothing to do the loop looks up this often, so that no wait is without an end.
_IDLE_WAIT_S = 1.0
# The most that taking messages may keep a step waiting that could be dispatched or collected.
_TAKE_S = 0.001
# The longest wait for the step that a cancelled one was cancelled for.
_CAUSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dispatched:
    """A step that was dispatched and not collected, with its result to come."""

    plan: StepPlan
    result: Future[StepResult]


class Loop:
    """Drives a replica's core. Everything but the steps runs on one thread.

    Attributes:
        load: the figures that it last took between two steps.
        sequences: the sequences that have not ended.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        core: ReplicaCore,
        executor: ThreadPoolExecutor,
        inbox: "queue.SimpleQueue[Message]",
        clock: Callable[[], float],
    ) -> None:
        """Takes the arguments of :class:`workers.engine.engine.Engine`, and its ``inbox``."""
        self._runner = runner
        self._core = core
        self._executor = executor
        self._inbox = inbox
        self._clock = clock
        self._block_size = core.settings.limits.block_size
        self._is_pipeline = core.settings.steps.num_batches > 1
        self._dispatched: deque[_Dispatched] = deque()
        self._pace = Pace()
        self._broken = False
        self._recovery = Recovery(runner, executor, clock)
        self._observers: dict[Sink, None] = {}
        self.sequences = EngineSequences()
        self.moves = Moves(core, self.sequences, clock)
        self.load: LoadSnapshot = core.load()

    def run(self, is_stopping: Callable[[], bool]) -> None:
        """Runs until ``is_stopping`` returns true. Raises what a step raised."""
        while self._take_messages(is_stopping):
            self._recovery.finish()
            self._dispatch()
            self._collect()

    def end(self, cause: str) -> None:
        """Makes the core end everything with the cause, since no step is computed any more."""
        self._handle(StepLost(cause=cause))

    def _handle(self, event: Event) -> list[Command]:
        commands = self._core.handle(event, self._clock())
        self.moves.obey(commands)
        return commands

    # -- messages -------------------------------------------------------------------------------------------------

    def _take_messages(self, is_stopping: Callable[[], bool]) -> bool:
        """Takes messages in their order until there is something else to do, and then for a moment more.

        Returns:
            False once the loop is to stop.
        """
        self.load = self._core.load()  # and whenever the loop waits: reports of that time must be exact
        waited_since_s: float | None = None  # since when a step waits for this
        while not is_stopping():
            wait_s = self._wait_s()
            if wait_s > 0:
                waited_since_s = None
                if self._inbox.empty():
                    self.load = self._core.load()
            elif waited_since_s is None:
                waited_since_s = self._clock()
            elif self._clock() - waited_since_s >= _TAKE_S:
                break
            try:
                message = self._inbox.get(block=wait_s > 0, timeout=wait_s or None)
            except queue.Empty:
                break
            self._take(message)
        return not is_stopping()

    def _wait_s(self) -> float:
        """Returns how long the loop may wait for a message: until a step can be dispatched or collected, in seconds."""
        if self._dispatched and self._dispatched[0].result.done():
            return 0.0
        if self._recovery.is_under_way:
            return 0.0 if self._recovery.is_due else _IDLE_WAIT_S
        if not self._core.wants_step:
            return _IDLE_WAIT_S
        if self._is_pipeline:
            return 0.0
        # A sequence that comes while a step executes joins the next one: that is put together as late as it can be.
        return self._pace.slack_s(self._clock())

    def _take(self, message: Message) -> None:
        match message:
            case Submitted(sink=sink, sequence_id=sequence_id):
                try:
                    self._submit(message)
                except HeterodyneError as error:
                    sink.refused(sequence_id, error)
            case Cancelled(sink=sink, sequence_id=sequence_id):
                core_id = self.sequences.find(sink, sequence_id)
                if core_id is not None:
                    self.moves.end(core_id)
                    self._tell_ended(self._handle(Cancel(sequence_id=core_id)))
            case Abandoned(sink=sink):
                self._observers.pop(sink, None)
                for core_id in self.sequences.of(sink):
                    self.moves.end(core_id)
                    self._handle(Cancel(sequence_id=core_id))
                    self.sequences.forget(core_id)
            case DrainAsked():
                self._handle(Drain())
            case Observing(sink=sink):
                self._observers[sink] = None
            case KvCame():
                self._handle(self.moves.came(message))
            case KvTaken(sink=sink, sequence_id=sequence_id, lapsed=lapsed):
                event = self.moves.taken(self.sequences.find(sink, sequence_id), lapsed=lapsed)
                if event is not None:
                    self._tell_ended(self._handle(event))
            case Woken():
                pass

    def _tell_ended(self, commands: Iterable[Command]) -> None:
        """Tells sinks of sequences that end between two steps."""
        self.sequences.end(_ended(commands), self._core.num_ended_steps)

    def _submit(self, message: Submitted) -> None:
        submission = message.submission
        core_id = self.sequences.next_id(message.sink, message.sequence_id)
        event = Submit(
            sequence_id=core_id,
            spec=submission.spec,
            submitted_s=message.at_s,
            emitted_ids=submission.emitted_ids,
            admitted=True,
        )
        for command in self._handle(event):
            assert isinstance(command, Refused), command
            raise command.error
        try:
            sequence = begin(message.sink, message.sequence_id, submission, self._block_size)
        except HeterodyneError:
            self._handle(Cancel(sequence_id=core_id))
            raise
        self.sequences.add(core_id, sequence)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Makes the core plan the next step, where there is room for one, and hands it to the executing thread."""
        if not self._core.wants_step or self._recovery.is_under_way or self._has_failed():
            return
        for command in self._handle(StepDue()):
            if isinstance(command, Run):
                self._run(command)

    def _has_failed(self) -> bool:
        """Tells whether the newest step has raised: it is to be collected before another is dispatched."""
        result = self._dispatched[-1].result if self._dispatched else None
        return result is not None and result.done() and result.exception() is not None

    def _run(self, command: Run) -> None:
        plan, now_s = command.plan, self._clock()
        self._give_up_preempted(plan)
        sequences = [self.sequences.by_core_id[chunk.sequence_id] for chunk in plan.chunks]
        batch = make_batch(command, sequences, self._block_size)
        result: Future[StepResult] = Future()
        try:
            step = self._runner.prepare(replace(batch, closed=self.moves.take_closed()))
            result = self._executor.submit(self._execute, step)
        except KvGone as gone:
            result.set_exception(gone)  # it is collected once the steps before it are
        result.add_done_callback(lambda _: self._inbox.put(Woken()))
        self._dispatched.append(_Dispatched(plan=plan, result=result))
        self._pace.prepared(num_tokens=plan.num_tokens, took_s=self._clock() - now_s, now_s=self._clock())

    def _give_up_preempted(self, plan: StepPlan) -> None:
        """Ends sequences whose keys and values go elsewhere and were preempted: who waits for them computes them."""
        for core_id in plan.preempted:
            if self.sequences.by_core_id[core_id].submission.ship is None:
                continue
            self.moves.end(core_id)
            (ended,) = _ended(self._handle(Cancel(sequence_id=core_id)))
            words = "its blocks were needed for another sequence"
            failed = replace(ended, reason=EndReason.FAILED, detail=words)
            self.sequences.end([failed], self._core.num_ended_steps)

    def _execute(self, step: Callable[[], StepResult]) -> StepResult:
        """Executes a step, on the executing thread, unless one before it raised: its inputs would be missing."""
        if self._broken:
            raise CancelledError
        try:
            return step()
        except BaseException:
            self._broken = True
            raise

    def _first_failure(self) -> BaseException | None:
        """Returns what a later step raised. In a pipeline, an earlier step may have been cancelled because of it."""
        for step in self._dispatched:
            try:
                failure = step.result.exception(_CAUSE_S)
            except (CancelledError, TimeoutError):
                continue
            if failure is not None and not isinstance(failure, CancelledError):
                return failure
        return None

    def _collect(self) -> None:
        """Passes the result of a step that has ended to the core, and tells every sink of it once."""
        if not self._dispatched or not self._dispatched[0].result.done():
            return
        dispatched = self._dispatched.popleft()
        try:
            result, plan = dispatched.result.result(), dispatched.plan
        except CancelledError as error:
            raise self._first_failure() or error from None
        except KvGone as gone:
            self._begin_recovery(gone)
            return
        self._recovery.step_ended()
        self._pace.executed(num_tokens=plan.num_tokens, took_s=result.duration_s, now_s=self._clock())
        commands = self._handle(StepEnded(step=plan.step, advances=advances(result)))
        answers = [command for command in commands if isinstance(command, Tell | Ended)]
        stats = StepStats(step=plan.step, duration_s=result.duration_s, load=plan.load)
        by_core_id = self.sequences.by_core_id
        for place, scores in result.scores.items():
            sequence = by_core_id.get(plan.chunks[place].sequence_id)
            if sequence is not None:
                sequence.tell_scores(scores)
        for sink, outputs in step_outputs(answers, by_core_id, plan, result, self._observers).items():
            sink.step(stats, outputs)
        for command in _ended(answers):
            self.moves.end(command.sequence_id)
            self.sequences.forget(command.sequence_id)
        for event in self.moves.taken_early():
            self._tell_ended(self._handle(event))

    def _begin_recovery(self, gone: KvGone) -> None:
        """Has everything computed again, once the runner has recovered from a step that raised."""
        self._recovery.begin(gone, self._mend, lambda: self._inbox.put(Woken()))
        self._dispatched.clear()
        self._pace.lost()
        ended = _ended(self._handle(KvLost(cause=cause_of(gone))))
        for command in ended:
            self.moves.end(command.sequence_id)
        self._tell_ended(ended)
        for core_id, sequence in self.sequences.by_core_id.items():
            sequence.roll_back(self._core.answer(core_id))

    def _mend(self) -> None:
        """Lets steps be executed again. On the executing thread, which has passed by all steps that were lost."""
        self._broken = False


def _ended(commands: Iterable[Command]) -> list[Ended]:
    return [command for command in commands if isinstance(command, Ended)]
