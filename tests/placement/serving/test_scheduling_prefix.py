"""Sharing computed blocks between sequences: who finds what, who waits for whom, what is counted."""

from collections.abc import Sequence as Seq

from placement.serving.kv.blocks import BlockPool
from placement.serving.prefix import chain_hashes
from placement.serving.scheduling import Scheduler
from placement.serving.sequence import Sequence
from placement.serving.step_plan import SchedulerLimits, StepPlan

BLOCK_SIZE = 4


class Engine:
    """Drives a scheduler; every sampled token is 7. Late: hashes of an answer are known a step later."""

    def __init__(
        self, *, blocks: int = 100, budget: int = 64, seqs: int = 0, prefix_cache: bool = True, late: bool = False
    ) -> None:
        self.pool = BlockPool(blocks, BLOCK_SIZE)
        limits = SchedulerLimits(token_budget=budget, max_num_seqs=seqs or budget)
        self.scheduler = Scheduler(self.pool, limits, prefix_cache=prefix_cache)
        self.tokens: dict[int, list[int]] = {}
        self.late = late

    def add(
        self, sid: int, prompt: Seq[int], *, max_tokens: int = 8, salt: bytes = b"", reuse: bool = True, rank: int = 0
    ) -> Sequence:
        self.tokens[sid] = list(prompt)
        sequence = Sequence(
            sequence_id=sid,
            num_prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            arrival=sid,
            priority=rank,
            block_hashes=chain_hashes(prompt, BLOCK_SIZE, salt),
            reuse_prefix=reuse,
        )
        self.scheduler.add(sequence)
        self.scheduler.check()
        return sequence

    def step(self) -> dict[int, tuple[int, int]]:
        """Runs a step. Returns where each chunk starts and how long it is, by sequence."""
        plan = self.scheduler.schedule()
        self.scheduler.check()
        self.finish(plan)
        return {chunk.sequence_id: (chunk.start, chunk.num_tokens) for chunk in plan.chunks}

    def finish(self, plan: StepPlan) -> None:
        self.scheduler.complete(plan.chunks)
        for chunk in plan.chunks:
            if chunk.samples:
                self._append(self.scheduler.sequence(chunk.sequence_id))
        self.scheduler.check()

    def _append(self, sequence: Sequence) -> None:
        tokens = self.tokens[sequence.sequence_id]
        tokens.append(7)
        known = tokens[:-1] if self.late else tokens
        sequence.num_output_tokens += 1
        sequence.block_hashes = chain_hashes(known, BLOCK_SIZE, b"", already=sequence.block_hashes)
        if sequence.num_output_tokens == sequence.max_tokens:
            self.scheduler.remove(sequence.sequence_id)


TEXT = range(100, 200)


def test_a_later_prompt_computes_only_what_follows_the_blocks_it_finds() -> None:
    engine = Engine()
    first = engine.add(1, TEXT[:10])
    engine.step()
    second = engine.add(2, [*TEXT[:10], 1, 2, 3])
    assert engine.step() == {1: (10, 1), 2: (8, 5)}
    assert second.block_table[:2] == first.block_table[:2]
    assert not set(second.block_table[2:]) & set(first.block_table)
    assert second.num_cached_tokens == 8 and first.num_cached_tokens == 0


def test_the_blocks_of_a_sequence_that_ended_are_found_its_answer_included() -> None:
    engine = Engine()
    engine.add(1, TEXT[:6], max_tokens=3)
    while engine.scheduler.num_running or engine.scheduler.num_waiting:
        engine.step()
    assert (engine.pool.num_free, engine.pool.num_cached) == (100, 2)
    engine.add(2, [*engine.tokens[1], 1])
    assert engine.step() == {2: (8, 2)}


def test_the_last_token_of_an_equal_prompt_is_computed_again() -> None:
    engine = Engine()
    engine.add(1, TEXT[:8])
    engine.step()
    again = engine.add(2, TEXT[:8])
    assert engine.step()[2] == (4, 4)
    assert again.num_cached_tokens == 4


def test_another_salt_finds_nothing() -> None:
    engine = Engine()
    engine.add(1, TEXT[:12], salt=b"one")
    engine.step()
    engine.add(2, TEXT[:12], salt=b"two")
    assert engine.step()[2] == (0, 12)


def test_who_wants_to_compute_everything_finds_nothing_but_is_found() -> None:
    engine = Engine()
    engine.add(1, TEXT[:12], max_tokens=1, reuse=False)
    engine.step()
    fresh = engine.add(2, TEXT[:12], reuse=False)
    assert engine.step() == {2: (0, 12)}
    engine.add(3, TEXT[:12])
    assert engine.step()[3] == (8, 4)
    assert fresh.num_cached_tokens == 0
    assert (engine.scheduler.num_prefix_queries, engine.scheduler.num_prefix_hits) == (12, 8)


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    engine = Engine(blocks=400, budget=64)
    sequences = [engine.add(sid, TEXT[:42], max_tokens=4) for sid in range(64)]
    assert engine.step() == {0: (0, 42)}
    assert engine.step() == {0: (42, 1), **dict.fromkeys(range(1, 32), (40, 2)), 32: (40, 1)}
    while engine.scheduler.num_waiting:
        engine.step()
    assert len({tuple(sequence.block_table[:10]) for sequence in sequences if sequence.block_table}) == 1
    assert (engine.scheduler.num_prefix_queries, engine.scheduler.num_prefix_hits) == (64 * 42, 63 * 40)
    assert [sequence.num_cached_tokens for sequence in sequences] == [0] + [40] * 63


def test_choices_of_one_request_share_its_prompt_without_a_prefix_cache_and_leave_nothing() -> None:
    engine = Engine(prefix_cache=False)
    choices = [engine.add(sid, TEXT[:17], max_tokens=3) for sid in range(4)]
    assert engine.step() == {0: (0, 17)}
    assert engine.step() == {0: (17, 1), **dict.fromkeys((1, 2, 3), (16, 1))}
    assert all(choice.block_table[:4] == choices[0].block_table[:4] for choice in choices)
    assert engine.pool.num_free == 100 - 4 - 4
    while engine.scheduler.num_running:
        engine.step()
    assert (engine.pool.num_free, engine.pool.num_cached) == (100, 0)
    engine.add(9, TEXT[:17])
    assert engine.step() == {9: (0, 17)}


def test_others_pass_who_waits_for_a_prompt_that_is_being_computed() -> None:
    engine = Engine(budget=16)
    engine.add(1, TEXT[:24])
    assert engine.step() == {1: (0, 16)}
    engine.add(2, [*TEXT[:24], 1])
    engine.add(3, [1, 2, 3])
    assert engine.step() == {1: (16, 8), 3: (0, 3)}
    assert engine.step() == {1: (24, 1), 3: (3, 1), 2: (24, 1)}


def test_a_prompt_that_differs_within_the_first_block_does_not_wait() -> None:
    engine = Engine(budget=16)
    engine.add(1, TEXT[:12])
    engine.add(2, [*TEXT[:3], 1])
    assert engine.step() == {1: (0, 12), 2: (0, 4)}


def test_who_waits_computes_itself_when_the_other_is_removed() -> None:
    engine = Engine(budget=8)
    engine.add(1, TEXT[:24])
    engine.add(2, TEXT[:24])
    assert engine.step() == {1: (0, 8)}
    plan = engine.scheduler.schedule()
    assert [chunk.sequence_id for chunk in plan.chunks] == [1]
    engine.scheduler.remove(1)  # in flight
    assert not engine.scheduler.schedule().chunks
    engine.finish(plan)
    assert engine.step() == {2: (16, 8)}


def test_who_waits_computes_itself_when_the_other_is_preempted() -> None:
    engine = Engine(blocks=8, budget=3)
    engine.add(1, range(4), max_tokens=16, rank=9)
    engine.step()
    owner = engine.add(2, TEXT[:20])
    engine.step()
    waiter = engine.add(3, TEXT[:20], rank=5)
    while not owner.num_preemptions:
        assert owner.block_table and not waiter.block_table
        engine.step()
    while not waiter.block_table:
        engine.step()
    assert waiter.num_cached_tokens == 12, "of 16 that the other had computed, one block was evicted for the first"
    while engine.scheduler.num_running or engine.scheduler.num_waiting:
        engine.step()
    assert (waiter.num_output_tokens, owner.num_output_tokens) == (8, 8)


def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    engine = Engine(budget=16)
    engine.add(1, TEXT[:24])
    engine.step()
    engine.add(2, TEXT[:24])
    assert engine.step() == {1: (16, 8)}
    assert engine.scheduler.remove(2)
    engine.scheduler.check()


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    engine = Engine(blocks=4, budget=16)
    engine.add(1, TEXT[:4], max_tokens=6)
    low = engine.add(2, TEXT[50:54], max_tokens=6, rank=-1)
    while not low.num_preemptions:
        engine.step()
    steps = [engine.step() for _ in range(5)]
    again = next(step[2] for step in steps if 2 in step)
    assert again == (4, 5), "of its two blocks the other needed one"
    assert low.num_cached_tokens == 0, "counts what was found at the first admission only"
    assert engine.scheduler.num_prefix_hits == 0 and engine.scheduler.num_prefix_queries == 8


def test_cached_blocks_make_room_for_new_prompts() -> None:
    engine = Engine(blocks=6)
    engine.add(1, TEXT[:20], max_tokens=1)
    engine.step()
    assert (engine.pool.num_free, engine.pool.num_cached) == (6, 5)
    engine.add(2, TEXT[50:66], max_tokens=1)
    assert engine.step() == {2: (0, 16)}
    engine.add(3, TEXT[:20], max_tokens=1)
    assert engine.step() == {3: (8, 12)}, "the end of the text was evicted first"


def test_a_prompt_that_shares_nearly_everything_fits_where_its_length_would_not() -> None:
    engine = Engine(blocks=8)
    engine.add(1, TEXT[:20], max_tokens=8)
    engine.step()
    engine.add(2, TEXT[:20], max_tokens=8)
    assert engine.step() == {1: (20, 1), 2: (16, 4)}
    assert engine.pool.num_free == 1


def test_a_block_whose_hash_comes_late_is_registered_with_the_next_step() -> None:
    engine = Engine(late=True)
    sequence = engine.add(1, TEXT[:6], max_tokens=20)
    engine.step()
    engine.step()
    engine.step()  # computes the eighth token
    assert sequence.num_computed_tokens == 8 and sequence.num_registered_blocks == 1
    engine.step()
    assert sequence.num_registered_blocks == 2


def test_a_block_whose_hash_comes_late_is_registered_when_the_sequence_leaves() -> None:
    engine = Engine()
    sequence = engine.add(1, [1, *TEXT[:7]])
    hashes, sequence.block_hashes = sequence.block_hashes, []
    engine.finish(engine.scheduler.schedule())
    sequence.block_hashes = hashes
    engine.scheduler.remove(1)
    engine.scheduler.check()
    assert all(engine.pool.find(block_hash) is not None for block_hash in hashes)


def test_sequences_without_hashes_share_nothing() -> None:
    engine = Engine()
    for sid in (1, 2):
        sequence = Sequence(sequence_id=sid, num_prompt_tokens=12, max_tokens=2, arrival=sid)
        engine.scheduler.add(sequence)
    plan = engine.scheduler.schedule()
    assert [chunk.num_tokens for chunk in plan.chunks] == [12, 12]
    engine.scheduler.complete(plan.chunks)
    engine.scheduler.check()
    assert engine.pool.num_free == 94
    assert engine.scheduler.num_prefix_queries == 0
