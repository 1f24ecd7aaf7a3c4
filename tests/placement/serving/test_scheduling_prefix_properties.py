"""Sharing is exact: whatever is added, computed, preempted, evicted and cancelled, a step reads the text it should.

The KV memory is simulated: a slot holds a digest of the whole text up to its token, as keys and values depend on it.
Each step checks what it reads when it runs, which may be well after it was planned.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from placement.serving.kv.blocks import BlockPool
from placement.serving.prefix import chain_hashes
from placement.serving.scheduling import Scheduler
from placement.serving.sequence import Sequence
from placement.serving.step_plan import Chunk, SchedulerLimits, StepPlan

MAX_IN_FLIGHT = 3
TEXTS = ([0, 1, 2] * 6, [0, 1, 2, 0] * 4, [2] * 12)
REQUEST = st.tuples(
    st.sampled_from(TEXTS),
    st.integers(0, 16),  # tokens of the text
    st.lists(st.integers(0, 2), min_size=1, max_size=3),  # and others after them
    st.integers(1, 12),  # answer
    st.integers(-1, 1),  # priority
    st.sampled_from([b"", b"", b"", b"other"]),
    st.sampled_from(["shares", "shares", "shares", "computes", "no hashes"]),
)
Request = tuple[list[int], int, list[int], int, int, bytes, str]


@dataclass
class Text:
    """A sequence and its tokens, as far as they are known."""

    sequence: Sequence
    salt: bytes
    digests: list[int]
    tokens: list[int]
    hashed: bool

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.digests.append(hash((self.digests[-1] if self.digests else self.salt, token)))

    def hash(self, block_size: int) -> None:
        if self.hashed:
            already = self.sequence.block_hashes
            self.sequence.block_hashes = chain_hashes(self.tokens, block_size, self.salt, already=already)


@dataclass
class Step:
    """A plan handed over, with the block tables of that moment."""

    plan: StepPlan
    tables: list[list[int]]
    executed: bool = False


class PrefixMachine(RuleBasedStateMachine):
    """Drives a scheduler as an overlapped engine does (counts a step when it hands it over) or as a pipeline does."""

    @initialize(
        num_blocks=st.integers(3, 16),
        block_size=st.integers(1, 4),
        budget=st.integers(1, 16),
        prefix_cache=st.booleans(),
        overlapped=st.booleans(),
        data=st.data(),
    )
    def start(
        self, num_blocks: int, block_size: int, budget: int, prefix_cache: bool, overlapped: bool, data: st.DataObject
    ) -> None:
        seqs = data.draw(st.integers(1, min(budget, 6)))
        self.pool = BlockPool(num_blocks, block_size)
        limits = SchedulerLimits(token_budget=budget, max_num_seqs=seqs)
        self.scheduler = Scheduler(self.pool, limits, prefix_cache=prefix_cache)
        self.prefix_cache, self.overlapped = prefix_cache, overlapped
        self.memory: dict[int, int] = {}
        self.texts: dict[int, Text] = {}  # all there ever were
        self.live: set[int] = set()
        self.steps: list[Step] = []
        self.found = self.looked_up = 0

    @rule(requests=st.lists(REQUEST, min_size=1, max_size=4))
    def add(self, requests: list[Request]) -> None:
        for request in requests:
            self._add(request)

    def _add(self, request: Request) -> None:
        text, length, others, answer, priority, salt, sharing = request
        capacity = self.pool.num_total * self.pool.block_size
        prompt = [*text[:length], *others][: capacity - 1]
        sequence = Sequence(
            sequence_id=len(self.texts),
            num_prompt_tokens=len(prompt),
            max_tokens=min(answer, capacity - len(prompt)),
            priority=priority,
            arrival=len(self.texts),
            reuse_prefix=sharing != "computes",
        )
        new = Text(sequence=sequence, salt=salt, digests=[], tokens=[], hashed=sharing != "no hashes")
        for token in prompt:
            new.append(token)
        new.hash(self.pool.block_size)
        self.texts[sequence.sequence_id] = new
        self.live.add(sequence.sequence_id)
        self.scheduler.add(sequence)

    @precondition(lambda self: len(self.steps) < MAX_IN_FLIGHT)
    @rule()
    def hand_over(self) -> None:
        fresh = [s for s in self._live() if not s.block_table and not s.num_preemptions]
        waiting = [s for s in self._live() if not s.block_table]
        running = [text for text in self.texts.values() if text.sequence.block_table]  # those too that leave
        plan = self.scheduler.schedule()
        assert plan.chunks or running or not waiting, "everybody waits"
        for sequence in fresh:
            if sequence.block_table and sequence.reuse_prefix and sequence.block_hashes:
                assert sequence.num_cached_tokens == sequence.num_computed_tokens < sequence.num_prompt_tokens
                self.found += sequence.num_cached_tokens
                self.looked_up += sequence.num_prompt_tokens
        if not plan.chunks:
            return
        sequences = [self.texts[chunk.sequence_id].sequence for chunk in plan.chunks]
        self.steps.append(Step(plan=plan, tables=[list(sequence.block_table) for sequence in sequences]))
        if self.overlapped:
            self._complete(plan)

    def _complete(self, plan: StepPlan) -> None:
        self.scheduler.complete(plan.chunks)
        for chunk in plan.chunks:
            sequence = self.texts[chunk.sequence_id].sequence
            if chunk.samples and chunk.sequence_id in self.live:
                sequence.num_output_tokens += 1
                if sequence.num_output_tokens == sequence.max_tokens:
                    assert self.scheduler.remove(chunk.sequence_id)
                    self.live.remove(chunk.sequence_id)

    @precondition(lambda self: any(not step.executed for step in self.steps))
    @rule()
    def execute(self) -> None:
        """The oldest step that has not run: in the order in which they were handed over."""
        step = next(step for step in self.steps if not step.executed)
        step.executed = True
        jobs = list(zip(step.plan.chunks, step.tables, strict=True))
        for chunk, table in jobs:
            self._read(chunk.sequence_id, table, chunk.start)
        for chunk, table in jobs:
            text = self.texts[chunk.sequence_id]
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                self.memory[self._slot(table, position)] = text.digests[position]
        for chunk, table in jobs:  # nobody wrote to what a batch-mate reads
            self._read(chunk.sequence_id, table, chunk.start + chunk.num_tokens)
            self._sample(chunk)
        if self.overlapped:
            self.steps.remove(step)

    def _sample(self, chunk: Chunk) -> None:
        text = self.texts[chunk.sequence_id]
        if chunk.samples:
            assert chunk.start + chunk.num_tokens == len(text.tokens)
            text.append(sum(text.tokens) % 3)

    def _read(self, sequence_id: int, table: Seq[int], num_tokens: int) -> None:
        read = [self.memory.get(self._slot(table, position)) for position in range(num_tokens)]
        assert read == self.texts[sequence_id].digests[:num_tokens], sequence_id

    def _slot(self, table: Seq[int], position: int) -> int:
        return table[position // self.pool.block_size] * self.pool.block_size + position % self.pool.block_size

    @precondition(lambda self: not self.overlapped and any(step.executed for step in self.steps))
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from([step for step in self.steps if step.executed]))
        self.steps.remove(step)
        self._complete(step.plan)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def hash_what_is_known(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(sorted(self.live)))
        self.texts[sequence_id].hash(self.pool.block_size)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), chance=st.integers(0, 2))
    def cancel(self, data: st.DataObject, chance: int) -> None:
        if not chance:  # rare, or few sequences would live long enough
            sequence_id = data.draw(st.sampled_from(sorted(self.live)))
            assert self.scheduler.remove(sequence_id)
            self.live.remove(sequence_id)

    @rule(times=st.integers(1, 8))
    def run(self, times: int) -> None:
        """Whole steps one after the other: how sequences get far enough to share and to fight for blocks."""
        for _ in range(times):
            self._settle()
            self.hand_over()
            self.everything_adds_up()

    def _settle(self) -> None:
        while self.steps:
            while any(not step.executed for step in self.steps):
                self.execute()
            if not self.overlapped:
                self._complete(self.steps.pop().plan)
        for sequence_id in self.live:
            text = self.texts[sequence_id]
            text.hash(self.pool.block_size)
            self._read(sequence_id, text.sequence.block_table, text.sequence.num_computed_tokens)

    def _live(self) -> list[Sequence]:
        return [self.texts[sequence_id].sequence for sequence_id in self.live]

    @invariant()
    def everything_adds_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        used = {block for text in self.texts.values() for block in text.sequence.block_table}
        assert self.pool.num_free + len(used) == self.pool.num_total
        assert self.prefix_cache or not self.pool.num_cached
        assert (self.scheduler.num_prefix_hits, self.scheduler.num_prefix_queries) == (self.found, self.looked_up)

    def teardown(self) -> None:
        """Nothing new comes: everything ends, within the steps that its tokens can need."""
        if not hasattr(self, "scheduler"):
            return
        answers = sum(sequence.max_tokens for sequence in self._live())
        tokens = sum(sequence.num_prompt_tokens + sequence.max_tokens for sequence in self._live())
        for _ in range((answers + 1) * (tokens + 1)):  # each preemption is paid for by an answer token
            self._settle()
            if not self.live:
                break
            self.hand_over()
            self.everything_adds_up()
        assert not self.live and self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.pool.num_free == self.pool.num_total
        assert self.prefix_cache or not self.pool.num_cached
        self.scheduler.check()


PrefixMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestPrefix = PrefixMachine.TestCase
