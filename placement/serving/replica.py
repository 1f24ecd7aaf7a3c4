"""Decides, from what happened to a replica, what it does next: events come in, commands go out.

The core has no thread, clock or socket: a worker's engine (workers/engine/loop.py) and a simulator drive the same
object. The sequences of a replica are waiting, computed, or on their way to or from other replicas (see
:class:`placement.serving.sequence.Phase`); steps compute some of them, and several steps may be on their way at once.

Early reuse of blocks: the core plans a step while the one before it executes, when the tokens of that one are not known
yet. It counts them all the same, since a sequence that samples gets exactly one, and shares or frees blocks as soon as
the last step that touches them is dispatched. Later steps may read and write these blocks, because steps execute in
order. Keys and values that come from another replica keep no order with steps: they wait until those steps have ended.
In a pipeline a sequence is in one step at a time, and the core counts its token only when that step has ended.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import assert_never

from placement.errors import HeterodyneError
from placement.serving.admission import check_spec, draining, repeated
from placement.serving.events import (
    Advance,
    Cancel,
    Command,
    Drain,
    Ended,
    EndReason,
    Event,
    HoldLapsed,
    KvArrived,
    KvLost,
    KvSent,
    LoadSnapshot,
    Receive,
    Refused,
    Run,
    StepDue,
    StepEnded,
    StepLost,
    Submit,
)
from placement.serving.figures import TokenTotals, num_dispatched, num_moving, snapshot
from placement.serving.kv.blocks import BlockPool
from placement.serving.kv.holds import Hold
from placement.serving.live import Arrivals, LiveSequence
from placement.serving.offload.orders import Names
from placement.serving.scheduling import Scheduler
from placement.serving.sequence import Phase
from placement.serving.settings import Checks, CoreSettings
from placement.serving.step_plan import StepPlan
from placement.serving.transfers import Transfer, Transfers

LATE_TRANSFER = "its keys and values were not taken in time"


class ReplicaCore:
    """Holds the state of a replica. One thread calls :meth:`handle` with one event after the other.

    Attributes:
        pool: the KV blocks of the replica.
        scheduler: decides what a step computes.
        num_ended_steps: how many steps have ended, or were lost.
        transfers: keys and values on their way.
    """

    def __init__(self, settings: CoreSettings) -> None:
        self.settings = settings
        self.pool = BlockPool(settings.num_blocks, settings.limits.block_size, settings.residency)
        self.scheduler = Scheduler(self.pool, settings.steps, prefix_cache=settings.prefix_cache)
        self._is_pipeline = settings.steps.num_batches > 1
        self._most_in_flight = settings.steps.num_batches + 1  # one in each stage, and one that waits
        self._arrivals = Arrivals(settings.limits.block_size)
        self._live: dict[int, LiveSequence] = {}
        self._in_flight: deque[StepPlan] = deque()
        self.transfers = Transfers()
        self._reserved: deque[tuple[int, int]] = deque()  # (the last step that may touch its blocks, sequence)
        self._shipping: dict[int, Hold] = {}  # by sequence, until its token is known
        self._newest_id = -1
        self._starved = False  # there was nothing to compute, and nothing has changed since
        self._draining = False
        self._lost: str | None = None
        self.num_ended_steps = 0
        self._num_lost_steps = 0
        self._totals = TokenTotals()

    def adopt(self, names: Names, *, stale: Iterable[int] = ()) -> int:
        """Finds blocks again that attention workers kept while the replica was lost; see :meth:`BlockPool.adopt`.

        Call it before anything is submitted. It does so without a prefix cache as well: what the replica was computing
        is submitted again, and then needs not be computed again.
        """
        assert self._newest_id < 0, "sequences are there already"
        return self.pool.adopt(names, stale=stale)

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Returns the commands to carry out, in order, after an event that happened at ``now_s``."""
        commands = self._decide(event, now_s)
        checks = self.settings.checks
        if checks is Checks.ALWAYS or (checks is Checks.AT_IDLE and self.is_idle):
            self.check()
        return commands

    def _decide(self, event: Event, now_s: float) -> list[Command]:
        match event:
            case StepDue():
                return self._plan_step(now_s)
            case StepEnded():
                return self._end_step(event, now_s)
            case Submit():
                return self._submit(event)
            case Cancel(sequence_id=sequence_id):
                return self._cancel(sequence_id)
            case Drain():
                self._draining = True
                return []
            case StepLost(cause=cause):
                return self._lose(cause)
            case KvLost(cause=cause):
                return self._lose_kv(cause)
            case KvArrived():
                return self._take_kv(event)
            case KvSent(hold_id=hold_id):
                return self._end_shipping(hold_id, EndReason.SHIPPED)
            case HoldLapsed(hold_id=hold_id):
                return self._lapse(hold_id)
        assert_never(event)

    # -- what may be asked between events -------------------------------------------------------------------------

    @property
    def wants_step(self) -> bool:
        """Tells whether :class:`StepDue` may give a step: there is room for one, and perhaps something to compute."""
        return bool(self._live) and not self._starved and len(self._in_flight) < self._most_in_flight

    @property
    def is_idle(self) -> bool:
        """Tells whether nothing is left to do, or to wait for."""
        return not (self._live or self._in_flight) and self.transfers.is_empty

    def phase(self, sequence_id: int) -> Phase | None:
        """Returns the phase of a sequence, or None once it has ended."""
        live = self._live.get(sequence_id)
        return None if live is None else live.sequence.phase

    def phases(self) -> set[Phase]:
        """Returns the phases that the sequences are in."""
        return {live.sequence.phase for live in self._live.values()}

    def answer(self, sequence_id: int) -> Seq[int]:
        """Returns the tokens of a sequence's answer that are known. Raises KeyError once it has ended."""
        live = self._live[sequence_id]
        return live.token_ids[live.sequence.num_prompt_tokens :]

    def load(self) -> LoadSnapshot:
        """Returns the figures of this moment."""
        live = self._live.values()
        is_still = self.transfers.is_empty and not self._reserved and not self._shipping
        return snapshot(
            self.scheduler,
            self.pool,
            live=live,
            num_dispatched=num_dispatched(self._in_flight, is_pipeline=self._is_pipeline),
            num_moving=0 if is_still else num_moving(live, len(self._shipping)),
            num_steps=self.num_ended_steps - self._num_lost_steps,
            totals=self._totals,
        )

    def check(self) -> None:
        """Asserts what must always hold between two events."""
        self.scheduler.check()
        assert len(self._in_flight) <= self._most_in_flight
        assert {hold.hold_id for hold in self.scheduler.transfers()} == (
            self.transfers.hold_ids | {hold.hold_id for hold in self._shipping.values()}
        )
        for live in self._live.values():
            live.check(is_counted_early=not self._is_pipeline)
        if self.is_idle:
            assert self.pool.num_free == self.pool.num_total, "blocks are kept, and nobody is there"
            assert not self.scheduler.num_running and not self.scheduler.num_waiting

    # -- sequences come and go ------------------------------------------------------------------------------------

    def _submit(self, event: Submit) -> list[Command]:
        sequence_id = event.sequence_id
        if self._lost is not None:
            return [Ended(sequence_id=sequence_id, reason=EndReason.FAILED, detail=self._lost)]
        try:
            if self._draining and not event.admitted:
                raise draining()
            check_spec(event.spec, self.settings.limits, num_emitted=len(event.emitted_ids))
            if sequence_id <= self._newest_id:
                raise repeated(sequence_id)
            live = self._arrivals.begin(event)
            self.scheduler.add(live.sequence)
        except HeterodyneError as error:
            return [Refused(sequence_id=sequence_id, error=error)]
        self._live[sequence_id] = live
        self._newest_id = sequence_id
        self._starved = False
        return []

    def _cancel(self, sequence_id: int) -> list[Command]:
        live = self._live.get(sequence_id)
        return [] if live is None else self._end(live, EndReason.CANCELLED)

    def _lose(self, cause: str) -> list[Command]:
        """Ends every sequence with the cause, and whatever is submitted later: no step is computed any more."""
        self._lost = cause
        commands = [
            command for live in list(self._live.values()) for command in self._end(live, EndReason.FAILED, cause)
        ]
        self._in_flight.clear()
        self._reserved.clear()
        self.scheduler.forget_leaving()
        return commands

    def _lose_kv(self, cause: str) -> list[Command]:
        """Has everything computed again. What goes to another replica ends, as where it is preempted."""
        if self._lost is not None:
            return []
        self.num_ended_steps += len(self._in_flight)
        self._num_lost_steps += len(self._in_flight)
        self._in_flight.clear()
        self._reserved.clear()
        commands: list[Command] = []
        for live in list(self._live.values()):
            if live.spec.ship_to is not None and live.sequence.phase is not Phase.WAITING:
                commands += self._end(live, EndReason.FAILED, cause)
            live.sequence.num_output_tokens = live.num_outputs  # no step gives what was counted early
        commands += self.transfers.revoke_all()
        sequences = [live.sequence for live in self._live.values()]
        self.scheduler.lose_kv(sequence for sequence in sequences if sequence.phase is Phase.LEAVING)
        self._starved = False
        return commands

    def _end(self, live: LiveSequence, reason: EndReason, detail: str = "") -> list[Command]:
        """Ends a sequence. A transfer of its keys and values keeps the blocks until that transfer ends, or lapses."""
        sequence_id = live.sequence.sequence_id
        del self._live[sequence_id]
        self.scheduler.remove(sequence_id)
        unsent = self._shipping.pop(sequence_id, None)
        if unsent is not None:
            self.scheduler.release(unsent)
        self._starved = False
        num_preemptions = live.sequence.num_preemptions
        ended = Ended(sequence_id=sequence_id, reason=reason, detail=detail, num_preemptions=num_preemptions)
        return [ended, *self.transfers.revoke(sequence_id)]

    # -- steps ----------------------------------------------------------------------------------------------------

    def _plan_step(self, now_s: float) -> list[Command]:
        if not self.wants_step:
            return []
        plan = self.scheduler.schedule()
        last_step = self._in_flight[-1].step if self._in_flight else self.num_ended_steps
        if plan.reserved:
            self._reserved += [(last_step, sequence_id) for sequence_id in plan.reserved]
        assert plan.chunks or not any(self._live[it].spec.ship_to for it in plan.preempted), "its blocks are not closed"
        commands = self._receive_reserved(now_s)
        # A preemption may have made room for somebody else: nobody is admitted in the same step.
        self._starved = not plan.chunks and not plan.preempted
        if not plan.chunks:
            return commands
        planned = [self._live[chunk.sequence_id] for chunk in plan.chunks]
        commands.append(self._run(plan, planned))
        self._in_flight.append(plan)
        for live in planned:
            if live.scheduled_s is None:
                live.scheduled_s = now_s
        self._count_early(plan)
        return commands

    def _run(self, plan: StepPlan, planned: Seq[LiveSequence]) -> Run:
        names, forgotten = self.pool.take_changes()
        return Run(
            plan=plan,
            token_ids=tuple([live.known(chunk) for live, chunk in zip(planned, plan.chunks, strict=True)]),
            tables=tuple([live.sequence.block_table for live in planned]),
            names=names,
            forgotten=forgotten,
        )

    def _count_early(self, plan: StepPlan) -> None:
        """Counts what a dispatched step will have done (early reuse of blocks, see the module).

        A sequence that reaches its greatest length in the step gives its blocks back.
        """
        early = [chunk for chunk in plan.chunks if not chunk.samples] if self._is_pipeline else plan.chunks
        self.scheduler.complete(early)
        for chunk in early:
            if chunk.samples:
                self._count(self._live[chunk.sequence_id], 1)

    def _count(self, live: LiveSequence, num_tokens: int) -> None:
        """Counts tokens of an answer, known or not. After the last one no step computes the sequence any more."""
        sequence = live.sequence
        sequence.num_output_tokens += num_tokens
        if sequence.num_output_tokens < sequence.max_tokens:
            return
        if live.spec.ship_to is not None:
            self._shipping[sequence.sequence_id] = self.scheduler.ship(sequence.sequence_id)
        elif self.scheduler.remove(sequence.sequence_id) and sequence.phase is not Phase.LEAVING:
            sequence.enter(Phase.LEAVING)

    def _end_step(self, event: StepEnded, now_s: float) -> list[Command]:
        if self._lost is not None:
            return []
        plan = self._in_flight.popleft()
        assert plan.step == event.step and len(plan.chunks) == len(event.advances), (plan, event)
        self.num_ended_steps += 1
        self._starved = False
        if self._is_pipeline:
            self._count_late(plan, event)
        commands = self._receive_reserved(now_s)
        for place, (chunk, advance) in enumerate(zip(plan.chunks, event.advances, strict=True)):
            live = self._live.get(chunk.sequence_id)
            given = len(advance.token_ids)
            assert self._is_pipeline or advance.failed is not None or given == chunk.samples, "counted beforehand"
            if live is not None:  # else it has ended while the step was on its way
                self._advance(live, place, advance, now_s, commands)
        return commands

    def _count_late(self, plan: StepPlan, event: StepEnded) -> None:
        late = [chunk for chunk in plan.chunks if chunk.samples]
        self.scheduler.complete(late)
        for chunk, advance in zip(plan.chunks, event.advances, strict=True):
            live = self._live.get(chunk.sequence_id)
            if live is not None and chunk.samples:
                self._count(live, len(live.accept(advance)[0]))

    def _advance(self, live: LiveSequence, place: int, advance: Advance, now_s: float, commands: list[Command]) -> None:
        """Adds the tokens that a sequence was given to its answer, and ends the sequence after its last token."""
        if advance.failed is not None:
            commands += self._end(live, EndReason.FAILED, advance.failed)
            return
        token_ids, reason = live.accept(advance)
        if not token_ids:
            return
        tell = live.tell(place, token_ids, now_s)
        if tell.first_index == live.num_emitted:
            self._totals.prompt += live.sequence.num_prompt_tokens
        self._totals.output += len(token_ids)
        live.token_ids += token_ids
        live.extend_hashes(self.settings.limits.block_size)
        commands.append(tell)
        if reason is EndReason.LENGTH and live.spec.ship_to is not None:
            hold = self._shipping.pop(live.sequence.sequence_id)
            commands.append(self.transfers.ship(live.sequence, hold))
        elif reason is not None:
            commands += self._end(live, reason)

    # -- keys and values on their way -----------------------------------------------------------------------------

    def _receive_reserved(self, now_s: float) -> list[Command]:
        """Asks for keys and values once no step on its way touches their blocks (early reuse, see the module)."""
        commands: list[Command] = []
        while self._reserved and self._reserved[0][0] <= self.num_ended_steps:
            live = self._live.get(self._reserved.popleft()[1])
            if live is not None:
                commands.append(self._receive(live, now_s))
        return commands

    def _receive(self, live: LiveSequence, now_s: float) -> Receive:
        sequence = live.sequence
        if live.scheduled_s is None:
            live.scheduled_s = now_s
        return self.transfers.receive(sequence, self.scheduler.expect(sequence.sequence_id))

    def _close(self, hold_id: int) -> Transfer | None:
        """Ends a transfer, and its hold. Returns None where it has ended, or lapsed, before."""
        transfer = self.transfers.find(hold_id)
        if transfer is not None:
            self.transfers.close(transfer)
            self.scheduler.release(transfer.hold)
            self._starved = False
        return transfer

    def _moving(self, transfer: Transfer | None) -> LiveSequence | None:
        """Returns the sequence that waits for the end of a transfer, or None where none does."""
        return None if transfer is None or transfer.is_revoked else self._live.get(transfer.sequence_id)

    def _take_kv(self, event: KvArrived) -> list[Command]:
        """Goes on with a sequence whose keys and values have come, unless nobody wants them any more."""
        live = self._moving(self._close(event.hold_id))
        if live is None:
            return []
        self.scheduler.arrive(live.sequence.sequence_id, event.num_tokens)
        return []

    def _end_shipping(self, hold_id: int, reason: EndReason, detail: str = "") -> list[Command]:
        live = self._moving(self._close(hold_id))
        return [] if live is None else self._end(live, reason, detail)

    def _lapse(self, hold_id: int) -> list[Command]:
        """Ends a transfer that took too long: a prompt that did not come is computed here, one not taken fails."""
        transfer = self.transfers.find(hold_id)
        if transfer is None or not transfer.is_incoming:
            return self._end_shipping(hold_id, EndReason.FAILED, LATE_TRANSFER)
        return self._take_kv(KvArrived(hold_id=hold_id, num_tokens=0))
