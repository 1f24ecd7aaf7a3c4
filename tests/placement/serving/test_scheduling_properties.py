"""Whatever is added, computed, delayed and cancelled, in any order: what the scheduler promises holds."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from placement.errors import InvalidRequest
from placement.serving.kv.blocks import BlockPool
from placement.serving.scheduling import Scheduler
from placement.serving.sequence import Sequence
from placement.serving.step_plan import SchedulerLimits, StepPlan

MAX_IN_FLIGHT = 3
REQUEST = st.tuples(st.integers(0, 10), st.integers(0, 12), st.integers(-1, 1))  # prompt, answer, priority


class SchedulerMachine(RuleBasedStateMachine):
    """Drives a scheduler as a pipeline would, several steps in flight, sampled tokens arriving late."""

    @initialize(num_blocks=st.integers(2, 12), block_size=st.integers(1, 4), budget=st.integers(1, 12), data=st.data())
    def start(self, num_blocks: int, block_size: int, budget: int, data: st.DataObject) -> None:
        seqs = data.draw(st.integers(1, min(budget, 5)))
        self.limits = SchedulerLimits(token_budget=budget, max_num_seqs=seqs)
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, self.limits)
        self.live: dict[int, Sequence] = {}
        self.leaving: set[int] = set()  # removed in flight
        self.progress: dict[int, int] = {}  # tokens covered by chunks so far
        self.in_flight: list[StepPlan] = []
        self.sampled: list[int] = []  # ids whose token is on its way
        self.arrivals = 0

    @rule(requests=st.lists(REQUEST, min_size=1, max_size=4))
    def add(self, requests: list[tuple[int, int, int]]) -> None:
        for prompt, answer, priority in requests:
            self._add(prompt, answer, priority)

    def _add(self, prompt: int, answer: int, priority: int) -> None:
        self.arrivals += 1
        sequence = Sequence(
            sequence_id=self.arrivals,
            num_prompt_tokens=prompt,
            max_tokens=answer,
            priority=priority,
            arrival=self.arrivals,
        )
        if prompt < 1 or answer < 1 or prompt + answer > self.pool.num_total * self.pool.block_size:
            with pytest.raises(InvalidRequest):
                self.scheduler.add(sequence)
            return
        self.scheduler.add(sequence)
        self.live[sequence.sequence_id] = sequence
        self.progress[sequence.sequence_id] = 0

    @precondition(lambda self: len(self.in_flight) < MAX_IN_FLIGHT)
    @rule()
    def schedule_another(self) -> None:
        self.schedule()

    def schedule(self) -> None:
        running = [s for s in self.live.values() if s.block_table]
        waiting = [s for s in self.live.values() if not s.block_table]
        free = [s for s in running if not s.in_flight and s.num_uncomputed_tokens]
        decodes = {s.sequence_id for s in free if s.is_decode}
        plan = self.scheduler.schedule()
        chunks = {chunk.sequence_id: chunk for chunk in plan.chunks}
        assert len(chunks) == len(plan.chunks)
        assert plan.num_tokens <= self.limits.token_budget
        assert decodes <= chunks.keys() | set(plan.preempted), "a decode stalled"
        assert all(chunks[sid].num_tokens == 1 for sid in decodes & chunks.keys())
        self._check_preemption(plan, free)
        self._check_admission(plan, running, waiting)
        for chunk in plan.chunks:
            sequence = self.live[chunk.sequence_id]
            assert chunk.num_tokens >= 1 and chunk.start == self.progress[chunk.sequence_id]
            self.progress[chunk.sequence_id] += chunk.num_tokens
            assert chunk.samples == (self.progress[chunk.sequence_id] == sequence.num_tokens)
        if plan.chunks:
            self.in_flight.append(plan)

    def _check_preemption(self, plan: StepPlan, free: list[Sequence]) -> None:
        victims = [s for s in free if s.sequence_id in plan.preempted]
        assert len(victims) == len(plan.preempted), "only what runs and is not in flight can be preempted"
        survivors = [s for s in free if s not in victims]
        assert all(survivor.rank < victim.rank for survivor in survivors for victim in victims)
        for victim in victims:
            self.progress[victim.sequence_id] = 0

    def _check_admission(self, plan: StepPlan, running: list[Sequence], waiting: list[Sequence]) -> None:
        admitted = [s for s in waiting if s.block_table]
        passed_over = [s for s in waiting if not s.block_table]
        assert not (admitted and plan.preempted)
        assert all(first.rank < later.rank for first in admitted for later in passed_over), "overtaken"
        if not running and waiting:
            assert admitted, "a request that fits must start when nothing runs"

    @rule(times=st.integers(1, 6))
    def run(self, times: int) -> None:
        """Whole steps one after the other: how sequences get far enough to fight for blocks."""
        for _ in range(times):
            self._settle()
            self.schedule()
            self.everything_adds_up()

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        self._complete(self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1))))

    def _complete(self, plan: StepPlan) -> None:
        self.scheduler.complete(plan.chunks)
        for chunk in plan.chunks:
            if chunk.sequence_id in self.leaving:
                self.leaving.remove(chunk.sequence_id)
                del self.live[chunk.sequence_id]
            elif chunk.samples:
                self.sampled.append(chunk.sequence_id)

    @precondition(lambda self: self.sampled)
    @rule(data=st.data())
    def output(self, data: st.DataObject) -> None:
        self._output(self.sampled.pop(data.draw(st.integers(0, len(self.sampled) - 1))))

    def _output(self, sequence_id: int) -> None:
        sequence = self.live.get(sequence_id)
        if sequence is None:
            return
        sequence.num_output_tokens += 1
        if sequence.num_output_tokens == sequence.max_tokens:
            assert self.scheduler.remove(sequence_id)
            del self.live[sequence_id]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), chance=st.integers(0, 3))
    def cancel(self, data: st.DataObject, chance: int) -> None:
        if chance:  # rare, or few sequences would live long enough
            return
        sequence = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        assert self.scheduler.remove(sequence.sequence_id) == (sequence.sequence_id not in self.leaving)
        if sequence.in_flight:
            self.leaving.add(sequence.sequence_id)
        else:
            del self.live[sequence.sequence_id]

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        tables = [s.block_table for s in self.live.values()]
        blocks = [block for table in tables for block in table]
        assert len(blocks) == len(set(blocks)), "a block is used by two sequences"
        assert self.pool.num_free + len(blocks) == self.pool.num_total
        assert self.scheduler.num_running == sum(bool(table) for table in tables)
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)
        pending = sum(s.num_uncomputed_tokens for s in self.live.values() if s.sequence_id not in self.leaving)
        assert self.scheduler.pending_tokens == pending

    def teardown(self) -> None:
        """Nothing new comes: everything ends, within the steps that its tokens can need."""
        if not hasattr(self, "scheduler"):
            return
        answers = sum(s.max_tokens for s in self.live.values())
        tokens = sum(s.num_prompt_tokens + s.max_tokens for s in self.live.values())
        for _ in range((answers + 1) * (tokens + 1)):  # each preemption is paid for by an answer token
            self._settle()
            if not self.live:
                break
            self.schedule()
            self.everything_adds_up()
        assert not self.live
        assert self.pool.num_free == self.pool.num_total

    def _settle(self) -> None:
        """Everything in flight completes and every sampled token arrives."""
        while self.in_flight:
            self._complete(self.in_flight.pop())
        while self.sampled:
            self._output(self.sampled.pop())


SchedulerMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
