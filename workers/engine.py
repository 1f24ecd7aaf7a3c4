"""The engine: one thread that owns a replica's sequences and runs its steps.

The loop reads: take commands, schedule, run, postprocess. Everything else in this file is called by it, except the
methods under "any thread", which only put a command in the inbox.
"""

import itertools
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future

from placement.blocks import BlockPool, block_runs
from placement.errors import HeterodyneError, cause_of
from placement.scheduling import Chunk, Scheduler, StepPlan
from placement.sequence import Sequence
from workers.engine_types import (
    Abandon,
    Cancel,
    Command,
    Drain,
    Draining,
    EndReason,
    Limits,
    LoadSnapshot,
    Output,
    Runner,
    Sink,
    Stop,
    Submission,
    Submit,
    Work,
    check_submission,
    repeated,
)
from workers.runner import SequenceInput
from workers.sampling import SampledToken

logger = logging.getLogger(__name__)

# An idle engine looks up this often, so that no wait is without an end.
_IDLE_WAIT_S = 1.0


class Engine:
    """Runs steps until stopped. Owns the scheduler, the block pool and the token ids of every sequence.

    Args:
        runner: computes a batch and samples; only this engine's thread calls it.
        scheduler: decides what each step computes, with the blocks of ``pool``.
        limits: what a submission may ask for.
        clock: seconds, monotonic.

    Attributes:
        load: its figures between two steps.
        failure: what a step raised; whatever is submitted from then on ends at once with that cause.
        ended: done when the loop was left, whichever way, and all that was submitted until then is answered.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        scheduler: Scheduler,
        pool: BlockPool,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._pool = pool
        self._limits = limits
        self._clock = clock
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._works: dict[int, Work] = {}
        self._engine_ids: dict[tuple[Sink, int], int] = {}
        self._next_id = itertools.count()
        self._steps = 0
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._draining = False
        self._stopped = False
        self.failure: Exception | None = None
        self.ended: Future[None] = Future()
        self.load = self._snapshot()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    # -- any thread -------------------------------------------------------------------------------------------

    def submit(self, sink: Sink, sequence_id: int, submission: Submission) -> None:
        """Ask for a sequence. The answer, outputs or a refusal, goes to ``sink``."""
        self._inbox.put(Submit(sink=sink, sequence_id=sequence_id, submission=submission, at_s=self._clock()))
        # Looked at after the put, as `_fail` empties the inbox after it is set: one of the two finds the command.
        if self.failure is not None:
            self._fail_inbox(self.failure)

    def cancel(self, sink: Sink, sequence_id: int) -> None:
        """End a sequence before the next step; it may already have ended."""
        self._inbox.put(Cancel(sink=sink, sequence_id=sequence_id))

    def abandon(self, sink: Sink) -> None:
        """The sink is gone: end everything submitted through it and send it nothing more."""
        self._inbox.put(Abandon(sink=sink))

    def drain(self) -> None:
        """Finish what was submitted before; refuse what comes after with ``Draining``."""
        self._inbox.put(Drain())

    def stop(self) -> None:
        """Leave the loop before the next step."""
        self._inbox.put(Stop())

    # -- the engine's thread ----------------------------------------------------------------------------------

    def run(self) -> None:
        """The loop. Ends after ``stop``, or with ``failure`` set when a step raised."""
        try:
            while self._take_commands():
                plan = self._scheduler.schedule()
                if plan.chunks:
                    self._postprocess(plan, self._runner.run(self._batch(plan)))
        except Exception as error:  # the border of the thread: whatever it was, every sequence must end
            logger.exception("engine_failed")
            self._fail(error)
        finally:
            self.ended.set_result(None)

    def _take_commands(self) -> bool:
        """Apply every command that waits; when there is nothing to compute, wait for one."""
        block = not self._works
        if block:  # what is reported while it waits must be what is
            self.load = self._snapshot()
        while not self._stopped:
            try:
                command = self._inbox.get(block=block, timeout=_IDLE_WAIT_S if block else None)
            except queue.Empty:
                break
            self._apply(command)
            block = False
        self.load = self._snapshot()
        return not self._stopped

    def _apply(self, command: Command) -> None:
        match command:
            case Submit():
                self._add(command)
            case Cancel(sink=sink, sequence_id=sequence_id):
                engine_id = self._engine_ids.get((sink, sequence_id))
                if engine_id is not None:
                    self._end(engine_id)
                    sink.step(self._steps, [Output(sequence_id=sequence_id, end=EndReason.CANCELLED)])
            case Abandon(sink=sink):
                for engine_id in [i for i, work in self._works.items() if work.sink is sink]:
                    self._end(engine_id)
            case Drain():
                self._draining = True
            case Stop():
                self._stopped = True

    def _add(self, command: Submit) -> None:
        submission, sink = command.submission, command.sink
        engine_id = next(self._next_id)
        sequence = Sequence(
            sequence_id=engine_id,
            num_prompt_tokens=len(submission.prompt_ids),
            max_tokens=submission.max_tokens,
            priority=submission.priority,
            arrival=engine_id,
        )
        try:
            if self._draining:
                raise Draining("this replica is draining and takes no new sequences")
            check_submission(submission, self._limits)
            if (sink, command.sequence_id) in self._engine_ids:
                raise repeated(command.sequence_id)
            self._scheduler.add(sequence)
        except HeterodyneError as error:
            sink.refused(command.sequence_id, error)
            return
        self._works[engine_id] = Work(
            sink=sink,
            sequence_id=command.sequence_id,
            submission=submission,
            sequence=sequence,
            token_ids=list(submission.prompt_ids),
            submitted_s=command.at_s,
        )
        self._engine_ids[sink, command.sequence_id] = engine_id

    def _batch(self, plan: StepPlan) -> list[SequenceInput]:
        now = self._clock()
        return [self._input(chunk, now) for chunk in plan.chunks]

    def _input(self, chunk: Chunk, now: float) -> SequenceInput:
        work = self._works[chunk.sequence_id]
        if work.scheduled_s is None:
            work.scheduled_s = now
        stop = chunk.start + chunk.num_tokens
        return SequenceInput(
            token_ids=work.token_ids[chunk.start : stop],
            start=chunk.start,
            runs=block_runs(work.sequence.block_table, self._limits.block_size, stop),
            params=work.submission.sampling if chunk.samples else None,
            output_index=work.sequence.num_output_tokens,
        )

    def _postprocess(self, plan: StepPlan, sampled: Seq[SampledToken | None]) -> None:
        """Take each sampled token into its sequence, end what is finished, and tell every sink once."""
        self._scheduler.complete(plan)
        self._steps += 1
        now = self._clock()
        outputs: defaultdict[Sink, list[Output]] = defaultdict(list)
        for chunk, token in zip(plan.chunks, sampled, strict=True):
            if chunk.samples:
                assert token is not None, chunk
                work = self._works[chunk.sequence_id]
                outputs[work.sink].append(self._append(work, token, now))
        for sink, items in outputs.items():
            sink.step(self._steps, items)

    def _append(self, work: Work, token: SampledToken, now: float) -> Output:
        index = work.sequence.num_output_tokens
        work.token_ids.append(token.token_id)
        work.sequence.num_output_tokens += 1
        self._output_tokens += 1
        end: EndReason | None = None
        if token.token_id in work.submission.stop_token_ids:
            end = EndReason.STOP
        elif work.sequence.num_output_tokens == work.submission.max_tokens:
            end = EndReason.LENGTH
        if end is not None:
            self._end(work.sequence.sequence_id)
        assert work.scheduled_s is not None, work
        first = index == 0
        if first:
            self._prompt_tokens += work.sequence.num_prompt_tokens
        return Output(
            sequence_id=work.sequence_id,
            index=index,
            token=token,
            end=end,
            num_preemptions=work.sequence.num_preemptions,
            queue_s=work.scheduled_s - work.submitted_s if first else None,
            prefill_s=now - work.scheduled_s if first else None,
        )

    def _end(self, engine_id: int) -> None:
        work = self._works.pop(engine_id)
        del self._engine_ids[work.sink, work.sequence_id]
        self._scheduler.remove(engine_id)

    def _fail(self, error: Exception) -> None:
        """A step raised: every sequence ends with the cause, those in the inbox too, and the engine takes no more."""
        self.failure = error
        outputs: defaultdict[Sink, list[Output]] = defaultdict(list)
        for work in self._works.values():
            outputs[work.sink].append(_failed(work.sequence_id, error))
        for sink, items in outputs.items():
            sink.step(self._steps, items)
        self._fail_inbox(error)

    def _fail_inbox(self, error: Exception) -> None:
        """Answer every submission in the inbox. Any thread: whoever takes a command out answers it."""
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(command, Submit):
                command.sink.step(self._steps, [_failed(command.sequence_id, error)])

    def _snapshot(self) -> LoadSnapshot:
        pool = self._pool
        return LoadSnapshot(
            steps=self._steps,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            free_blocks=pool.num_free,
            total_blocks=pool.num_total,
            num_preemptions=self._scheduler.num_preemptions,
            pending_tokens=self._scheduler.pending_tokens,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
        )


def _failed(sequence_id: int, error: Exception) -> Output:
    return Output(sequence_id=sequence_id, end=EndReason.FAILED, detail=cause_of(error))
