"""The engine: one thread that owns a replica's sequences, and one that runs its steps.

The loop reads: take commands, dispatch the next step, collect the last. A step is dispatched while the one before it
executes, so that scheduling, laying out and answering cost the device nothing (overlapped scheduling). What its
sequences were given by the step before is known to the executing thread alone; here it is counted, not known. Steps
execute in the order of dispatch, so blocks may be given away as soon as the last step that reads them is dispatched.

The loop waits for one thing only, the inbox, where the end of a step arrives too: a step that never ends holds up no
command, and no stop.

Everything else in this file is called by the loop, except the methods under "any thread".
"""

import itertools
import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

from placement.errors import HeterodyneError, cause_of
from placement.serving.blocks import BlockPool
from placement.serving.scheduling import Scheduler
from placement.serving.step_plan import Chunk, StepPlan
from workers.engine.batch import make_batch
from workers.engine.pacing import Pace
from workers.engine.types import (
    STOPS,
    Abandon,
    Cancel,
    Command,
    Draining,
    EndReason,
    Limits,
    LoadSnapshot,
    Output,
    Runner,
    Sink,
    StepDone,
    StepStats,
    Stop,
    Stopping,
    Submission,
    Submit,
    check_submission,
    repeated,
)
from workers.engine.work import Work, begin
from workers.sampling.sampling import SamplingFailed
from workers.step.types import StepResult

logger = logging.getLogger(__name__)

# Where there is nothing to do the engine looks up this often, so that no wait is without an end.
_IDLE_WAIT_S = 1.0
# The most that taking commands may keep a step waiting that could be dispatched or collected.
_TAKE_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dispatched:
    """A step on its way."""

    plan: StepPlan
    result: Future[StepResult]


class Engine:
    """Runs steps until stopped. Owns the scheduler, the block pool and the token ids of every sequence.

    Args:
        runner: computes a batch and samples; only this engine calls it.
        scheduler: decides what each step computes, with the blocks of ``pool``.
        limits: what a submission may ask for.
        executor: of one thread, which executes the steps, or of one for each step of a pipeline that is on its way, and
            one for the next; ends with the engine.
        num_stages: of the pipeline that the runner runs. With several, a sequence is in one step at a time, so that no
            step waits for the token of another.
        clock: seconds, monotonic.

    Attributes:
        limits: as given.
        load: its figures between two steps.
        failure: what a step raised; whatever is submitted from then on ends at once with that cause.
        stop_cause: why it was told to stop, if it was.
        ended: done when the loop was left, whichever way, and all that was submitted until then is answered. A step
            may still execute then: ``thread`` ends after it.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        scheduler: Scheduler,
        pool: BlockPool,
        limits: Limits,
        executor: ThreadPoolExecutor,
        num_stages: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._pool = pool
        self.limits = limits
        self._clock = clock
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._executor = executor
        self._is_pipeline = num_stages > 1
        # Steps that are dispatched and not collected: one at each stage, and one that waits.
        self._most_dispatched = num_stages + 1
        self._dispatched: deque[_Dispatched] = deque()
        self._pace = Pace()
        self._works: dict[int, Work] = {}
        self._engine_ids: dict[tuple[Sink, int], int] = {}
        self._next_id = itertools.count()
        self._steps = 0
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._starved = False  # the scheduler had nothing to compute, and nothing has changed since
        self._broken = False
        self._draining = False
        self._stopping = False
        self.stop_cause = STOPS
        self._closed = False
        self.failure: BaseException | None = None
        self.ended: Future[None] = Future()
        self.load = self._snapshot()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    # -- any thread -------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Ask whether a new sequence would be taken; one that is admitted may be submitted later, after a drain too.

        Raises:
            Draining: this replica takes no new sequences.
        """
        if self._draining:
            raise Draining("this replica is draining and takes no new sequences")

    def drain(self) -> None:
        """Finish what was admitted before; admit nothing from now on."""
        self._draining = True

    def submit(self, sink: Sink, sequence_id: int, submission: Submission) -> None:
        """Hand over a sequence that was admitted. The answer, outputs or a refusal, goes to ``sink``."""
        self._inbox.put(Submit(sink=sink, sequence_id=sequence_id, submission=submission, at_s=self._clock()))
        # Looked at after the put, and the loop empties the inbox after it is set: one of the two finds the command.
        if self._closed:
            self._answer_inbox()

    def cancel(self, sink: Sink, sequence_id: int) -> None:
        """End a sequence before the next step; it may already have ended."""
        self._inbox.put(Cancel(sink=sink, sequence_id=sequence_id))

    def abandon(self, sink: Sink) -> None:
        """The sink is gone: end everything submitted through it and send it nothing more."""
        self._inbox.put(Abandon(sink=sink))

    def stop(self, cause: str = STOPS) -> None:
        """Leave the loop, whatever is in the inbox and in execution; what has not ended by then ends as failed."""
        if not self._stopping:
            self.stop_cause = cause
        self._stopping = True
        self._inbox.put(Stop())

    # -- the engine's thread ----------------------------------------------------------------------------------

    def run(self) -> None:
        """The loop. Ends after ``stop``, or with ``failure`` set when a step raised."""
        try:
            while self._take_commands():
                self._dispatch()
                self._collect()
            self._answer_all(Stopping(self.stop_cause))
        except BaseException as error:  # the border of the thread: whatever it was, every sequence must end
            logger.exception("engine_failed")
            self.failure = error
            self._answer_all(error)
        finally:
            self.ended.set_result(None)
            self._executor.shutdown(cancel_futures=True)

    def _take_commands(self) -> bool:
        """Apply commands in their order until there is something else to do, and then for a moment more.

        Returns:
            False once the engine is to stop.
        """
        self.load = self._snapshot()  # and whenever it waits: what is reported meanwhile must be what is
        waited_since_s: float | None = None  # since when a step waits for this
        while not self._stopping:
            wait_s = self._wait_s()
            if wait_s > 0:
                waited_since_s = None
                if self._inbox.empty():
                    self.load = self._snapshot()
            elif waited_since_s is None:
                waited_since_s = self._clock()
            elif self._clock() - waited_since_s >= _TAKE_S:
                break
            try:
                command = self._inbox.get(block=wait_s > 0, timeout=wait_s or None)
            except queue.Empty:
                break
            self._apply(command)
        return not self._stopping

    def _wait_s(self) -> float:
        """How long the next command may be waited for: until a step can be dispatched or collected."""
        if self._dispatched and self._dispatched[0].result.done():
            return 0.0
        if len(self._dispatched) == self._most_dispatched or self._starved or not self._works:
            return _IDLE_WAIT_S
        if self._is_pipeline:
            return 0.0
        # A sequence that comes while a step executes joins the next, so that is put together as late as it can be.
        return self._pace.slack_s(self._clock())

    def _apply(self, command: Command) -> None:
        match command:
            case Submit():
                self._add(command)
            case Cancel(sink=sink, sequence_id=sequence_id):
                engine_id = self._engine_ids.get((sink, sequence_id))
                if engine_id is not None:
                    self._end(engine_id)
                    output = Output(sequence_id=sequence_id, end=EndReason.CANCELLED)
                    sink.step(StepStats(step=self._steps), [output])
            case Abandon(sink=sink):
                for engine_id in [i for i, work in self._works.items() if work.sink is sink]:
                    self._end(engine_id)
            case Stop() | StepDone():  # these only wake the loop
                pass

    def _add(self, command: Submit) -> None:
        sink, sequence_id = command.sink, command.sequence_id
        engine_id = next(self._next_id)
        try:
            check_submission(command.submission, self.limits)
            if (sink, sequence_id) in self._engine_ids:
                raise repeated(sequence_id)
            work = begin(command, engine_id, self.limits.block_size)
            self._scheduler.add(work.sequence)
        except HeterodyneError as error:
            sink.refused(sequence_id, error)
            return
        self._works[engine_id] = work
        self._engine_ids[sink, sequence_id] = engine_id
        self._starved = False

    def _dispatch(self) -> None:
        """Put the next step together, where there is room for one, and hand it to the executing thread."""
        if len(self._dispatched) == self._most_dispatched:
            return
        plan = self._scheduler.schedule()
        self._starved = not plan.chunks
        if self._starved:
            return
        now = self._clock()
        works = [self._works[chunk.sequence_id] for chunk in plan.chunks]
        step = self._runner.prepare(make_batch(plan.chunks, works, self.limits.block_size))
        result = self._executor.submit(self._execute, step)
        result.add_done_callback(lambda _: self._inbox.put(StepDone()))
        self._dispatched.append(_Dispatched(plan=plan, result=result))
        self._count(plan, works, now)
        self._pace.prepared(num_tokens=plan.num_tokens, took_s=self._clock() - now, now_s=self._clock())

    def _execute(self, step: Callable[[], StepResult]) -> StepResult:
        """On the executing thread: run a step, unless one before it raised, for it would build on what is not there."""
        if self._broken:
            raise CancelledError
        try:
            return step()
        except BaseException:
            self._broken = True
            raise

    def _count(self, plan: StepPlan, works: list[Work], now: float) -> None:
        """What the step will have done; sequences that it ends by length hold their blocks no longer.

        In a pipeline the chunks that sample are counted when they did.
        """
        early = [chunk for chunk in plan.chunks if not (self._is_pipeline and chunk.samples)]
        self._scheduler.complete(early)
        for work in works:
            if work.scheduled_s is None:
                work.scheduled_s = now
        self._count_samples(early)

    def _count_samples(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            work = self._works.get(chunk.sequence_id)
            if work is None or not chunk.samples:
                continue
            work.sequence.num_output_tokens += 1
            if work.sequence.num_output_tokens == work.submission.max_tokens:
                self._scheduler.remove(chunk.sequence_id)

    def _collect(self) -> None:
        """Where a step has ended, take each sampled token into its sequence, and tell every sink once."""
        if not self._dispatched or not self._dispatched[0].result.done():
            return
        dispatched = self._dispatched.popleft()
        result, plan = dispatched.result.result(), dispatched.plan
        now = self._clock()
        self._steps += 1
        self._starved = False
        self._pace.executed(num_tokens=plan.num_tokens, took_s=result.duration_s, now_s=now)
        if self._is_pipeline:
            late = [chunk for chunk in plan.chunks if chunk.samples]
            self._scheduler.complete(late)
            self._count_samples(late)
        outputs: defaultdict[Sink, list[Output]] = defaultdict(list)
        for index, chunk in enumerate(plan.chunks):
            work = self._works.get(chunk.sequence_id)
            if work is not None:  # else it has ended while the step was on its way
                outputs[work.sink] += self._take(chunk.sequence_id, work, result, index, now)
        num_decodes = sum(chunk.num_tokens == 1 for chunk in plan.chunks)
        stats = StepStats(
            step=self._steps, duration_s=result.duration_s, num_tokens=plan.num_tokens, num_decodes=num_decodes
        )
        for sink, items in outputs.items():
            sink.step(stats, items)

    def _take(self, engine_id: int, work: Work, result: StepResult, index: int, now: float) -> list[Output]:
        """What a step gave one sequence."""
        token, scores = result.tokens[index], result.scores.get(index)
        outputs = [] if scores is None else [Output(sequence_id=work.sequence_id, scores=scores)]
        if isinstance(token, SamplingFailed):
            outputs.append(_failed(work.sequence_id, token))
        elif token is not None:
            if not work.num_outputs:
                self._prompt_tokens += work.sequence.num_prompt_tokens
            self._output_tokens += 1
            outputs.append(work.append(token, is_complete=index in result.complete, now=now))
            work.extend_hashes(self.limits.block_size)
        if outputs and outputs[-1].end is not None:
            self._end(engine_id)
        return outputs

    def _end(self, engine_id: int) -> None:
        work = self._works.pop(engine_id)
        del self._engine_ids[work.sink, work.sequence_id]
        self._scheduler.remove(engine_id)
        self._starved = False

    def _answer_all(self, cause: BaseException) -> None:
        """The loop is left: every sequence ends with the cause, and the engine takes no more."""
        self._closed = True
        outputs: defaultdict[Sink, list[Output]] = defaultdict(list)
        for work in self._works.values():
            outputs[work.sink].append(_failed(work.sequence_id, cause))
        for sink, items in outputs.items():
            sink.step(StepStats(step=self._steps), items)
        self._answer_inbox()
        if self.failure is None:  # else what the scheduler holds may be in disorder
            for engine_id in list(self._works):
                self._end(engine_id)

    def _answer_inbox(self) -> None:
        """Answer every submission in the inbox. Any thread: whoever takes a command out answers it."""
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            if not isinstance(command, Submit):
                continue
            if self.failure is None:
                command.sink.refused(command.sequence_id, Stopping(self.stop_cause))
            else:
                command.sink.step(StepStats(step=self._steps), [_failed(command.sequence_id, self.failure)])

    def _snapshot(self) -> LoadSnapshot:
        """What is dispatched counts as running and pending until it is collected, whatever the scheduler has let go."""
        pool, scheduler = self._pool, self._scheduler
        return LoadSnapshot(
            steps=self._steps,
            num_running=len(self._works) - scheduler.num_waiting,
            num_waiting=scheduler.num_waiting,
            free_blocks=pool.num_free,
            total_blocks=pool.num_total,
            num_preemptions=scheduler.num_preemptions,
            pending_tokens=scheduler.pending_tokens + sum(step.plan.num_tokens for step in self._dispatched),
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
        )


def _failed(sequence_id: int, error: BaseException) -> Output:
    return Output(sequence_id=sequence_id, end=EndReason.FAILED, detail=cause_of(error))
