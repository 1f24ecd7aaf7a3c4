import pytest

from placement.errors import InvalidRequest
from placement.serving.kv.blocks import BlockPool
from placement.serving.scheduling import Scheduler
from placement.serving.sequence import Sequence
from placement.serving.step_plan import Chunk, SchedulerLimits, StepPlan


def make_scheduler(num_blocks: int = 100, block_size: int = 4, budget: int = 16, seqs: int = 8) -> Scheduler:
    limits = SchedulerLimits(token_budget=budget, max_num_seqs=seqs)
    return Scheduler(BlockPool(num_blocks, block_size), limits)


def add(scheduler: Scheduler, *, sid: int, prompt: int, max_tokens: int = 8, priority: int = 0) -> Sequence:
    sequence = Sequence(
        sequence_id=sid, num_prompt_tokens=prompt, max_tokens=max_tokens, priority=priority, arrival=sid
    )
    scheduler.add(sequence)
    return sequence


def finish(scheduler: Scheduler, plan: StepPlan) -> None:
    """What a worker does after a step: complete, count the sampled tokens, remove what ended."""
    scheduler.complete(plan.chunks)
    for chunk in plan.chunks:
        if chunk.samples:
            sequence = scheduler.sequence(chunk.sequence_id)
            sequence.num_output_tokens += 1
            if sequence.num_output_tokens == sequence.max_tokens:
                scheduler.remove(chunk.sequence_id)
    scheduler.check()


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    finish(scheduler, plan)
    return plan


def sizes(plan: StepPlan) -> dict[int, int]:
    return {chunk.sequence_id: chunk.num_tokens for chunk in plan.chunks}


def test_prompt_is_cut_into_chunks_of_the_budget_and_samples_at_its_end() -> None:
    scheduler = make_scheduler(budget=16)
    add(scheduler, sid=1, prompt=40)
    chunks = [step(scheduler).chunks for _ in range(3)]
    assert chunks == [
        (Chunk(sequence_id=1, start=0, num_tokens=16, samples=False),),
        (Chunk(sequence_id=1, start=16, num_tokens=16, samples=False),),
        (Chunk(sequence_id=1, start=32, num_tokens=8, samples=True),),
    ]


def test_decode_is_in_every_step_while_a_long_prompt_prefills() -> None:
    scheduler = make_scheduler(num_blocks=400, budget=16)
    add(scheduler, sid=1, prompt=4, max_tokens=200)
    step(scheduler)
    add(scheduler, sid=2, prompt=1000)
    plans: list[StepPlan] = []
    while not plans or not plans[-1].chunks[-1].samples or plans[-1].chunks[-1].sequence_id == 1:
        plans.append(step(scheduler))
    assert len(plans) == -(-1000 // 15)  # the budget counts the decode
    for i, plan in enumerate(plans):
        assert plan.chunks[0] == Chunk(sequence_id=1, start=4 + i, num_tokens=1, samples=True, is_decode=True)
    assert all(plan.num_tokens == 16 for plan in plans[:-1])


def test_partial_prefill_goes_on_before_new_requests_start() -> None:
    scheduler = make_scheduler(budget=16)
    add(scheduler, sid=1, prompt=20)
    step(scheduler)
    add(scheduler, sid=2, prompt=30, priority=9)
    assert sizes(step(scheduler)) == {1: 4, 2: 12}


def test_partial_prefills_share_the_budget_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(budget=16)
    add(scheduler, sid=1, prompt=10)
    add(scheduler, sid=2, prompt=20)
    step(scheduler)  # 10 + 6
    add(scheduler, sid=3, prompt=30, priority=5)
    assert sizes(step(scheduler)) == {1: 1, 2: 14, 3: 1}
    assert [chunk.sequence_id for chunk in step(scheduler).chunks] == [1, 2, 3]
    add(scheduler, sid=4, prompt=40, priority=7)
    assert list(sizes(step(scheduler))) == [1, 2, 3]  # the budget is used up by what runs


def test_waiting_requests_start_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(budget=4, seqs=4)
    for sid, priority in ((1, 0), (2, 5), (3, 5), (4, -1)):
        add(scheduler, sid=sid, prompt=4, max_tokens=1, priority=priority)
    assert [step(scheduler).chunks[0].sequence_id for _ in range(4)] == [2, 3, 1, 4]
    assert not step(scheduler).chunks


def test_max_num_seqs_bounds_what_runs() -> None:
    scheduler = make_scheduler(seqs=2)
    for sid in (1, 2, 3):
        add(scheduler, sid=sid, prompt=2)
    assert set(sizes(step(scheduler))) == {1, 2}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_admission_takes_the_blocks_of_the_whole_prompt_at_once() -> None:
    scheduler = make_scheduler(block_size=4, budget=8)
    sequence = add(scheduler, sid=1, prompt=30)
    step(scheduler)
    assert sequence.num_computed_tokens == 8 and len(sequence.block_table) == 8


def test_prefill_waits_when_no_free_blocks() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    add(scheduler, sid=1, prompt=8, max_tokens=2)
    add(scheduler, sid=2, prompt=16, max_tokens=2)
    assert sizes(step(scheduler)) == {1: 8}
    assert scheduler.num_waiting == 1
    step(scheduler)
    assert sizes(step(scheduler)) == {2: 16}


def test_admission_leaves_one_block_for_each_running_sequence() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    add(scheduler, sid=1, prompt=8)
    step(scheduler)
    add(scheduler, sid=2, prompt=12)  # the 3 blocks that the decode leaves would hold it, with none to spare
    assert sizes(step(scheduler)) == {1: 1}
    scheduler.remove(2)
    add(scheduler, sid=3, prompt=8)
    assert sizes(step(scheduler)) == {1: 1, 3: 8}


def test_request_that_needs_every_block_runs_alone() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    add(scheduler, sid=1, prompt=15, max_tokens=1)
    assert sizes(step(scheduler)) == {1: 15}
    assert scheduler.num_running == 0


def test_nobody_overtakes_a_request_that_does_not_fit() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    add(scheduler, sid=1, prompt=8, max_tokens=3)
    step(scheduler)
    add(scheduler, sid=2, prompt=20, max_tokens=4)
    add(scheduler, sid=3, prompt=1, max_tokens=4)
    assert sizes(step(scheduler)) == {1: 1}
    assert sizes(step(scheduler)) == {1: 1}  # its last token
    assert list(sizes(step(scheduler))) == [2]


def test_lowest_priority_is_preempted_when_a_decode_finds_no_block() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4, budget=16)
    low = add(scheduler, sid=1, prompt=4, max_tokens=4, priority=-1)
    high = add(scheduler, sid=2, prompt=4, max_tokens=8)
    step(scheduler)  # both prompts; one block is left
    plan = step(scheduler)  # both need a second block
    assert plan.preempted == (1,) and sizes(plan) == {2: 1}
    assert (low.num_computed_tokens, low.num_preemptions, low.block_table) == (0, 1, [])
    assert len(high.block_table) == 2 and scheduler.num_preemptions == 1


def test_latest_arrival_is_preempted_among_equals() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, budget=16)
    add(scheduler, sid=1, prompt=6, max_tokens=8)
    add(scheduler, sid=2, prompt=4, max_tokens=8)
    step(scheduler)
    step(scheduler)  # 2 takes the last block
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted == (2,) and sizes(plan) == {1: 1}


def test_sequence_that_finds_no_block_gives_way_itself_when_it_ranks_lowest() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, budget=16)
    add(scheduler, sid=1, prompt=4, max_tokens=8)
    add(scheduler, sid=2, prompt=6, max_tokens=8)
    step(scheduler)
    step(scheduler)  # 1 takes the last block
    step(scheduler)
    plan = step(scheduler)
    assert plan.preempted == (2,) and sizes(plan) == {1: 1}


def test_running_prefill_is_preempted_before_a_decode_of_higher_rank() -> None:
    scheduler = make_scheduler(num_blocks=9, block_size=4, budget=2, seqs=2)
    add(scheduler, sid=1, prompt=2, max_tokens=20)
    step(scheduler)
    prefill = add(scheduler, sid=2, prompt=24, max_tokens=4)
    plans = [step(scheduler) for _ in range(10)]  # a decode and a token of the prompt each
    assert prefill.num_computed_tokens == 10 and len(prefill.block_table) == 6
    assert step(scheduler).preempted == (2,)
    assert all(plan.chunks[0].sequence_id == 1 for plan in plans)


def test_nothing_is_admitted_in_a_step_that_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, budget=16)
    add(scheduler, sid=1, prompt=4, max_tokens=8)
    add(scheduler, sid=2, prompt=8, max_tokens=8)
    step(scheduler)
    add(scheduler, sid=3, prompt=1, max_tokens=1, priority=9)
    plan = step(scheduler)  # the two blocks taken from 2 would hold 3, with one to spare
    assert plan.preempted == (2,) and sizes(plan) == {1: 1}
    assert scheduler.num_waiting == 2


def test_preempted_sequence_is_recomputed_with_its_answer_so_far() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4, budget=16)
    add(scheduler, sid=1, prompt=4, max_tokens=2)
    again = add(scheduler, sid=2, prompt=4, max_tokens=8)
    step(scheduler)
    assert step(scheduler).preempted == (2,)
    assert step(scheduler).chunks == (Chunk(sequence_id=2, start=0, num_tokens=5, samples=True),)
    assert again.num_output_tokens == 2


def test_sequence_in_flight_is_skipped_until_its_step_completes() -> None:
    scheduler = make_scheduler(budget=16)
    add(scheduler, sid=1, prompt=20)
    first = scheduler.schedule()
    add(scheduler, sid=2, prompt=4)
    second = scheduler.schedule()
    assert (sizes(first), sizes(second)) == ({1: 16}, {2: 4})
    assert not scheduler.schedule().chunks
    finish(scheduler, second)
    finish(scheduler, first)
    assert sizes(scheduler.schedule()) == {2: 1, 1: 4}


def test_sequence_in_flight_is_not_preempted() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4, budget=16)
    add(scheduler, sid=1, prompt=4, priority=-1)
    add(scheduler, sid=2, prompt=4)
    scheduler.complete(scheduler.schedule().chunks)
    scheduler.sequence(1).num_output_tokens += 1
    low = scheduler.schedule()  # takes the last block
    assert sizes(low) == {1: 1}
    scheduler.sequence(2).num_output_tokens += 1
    assert scheduler.schedule().preempted == (2,)


def test_sequence_that_awaits_its_sampled_token_is_not_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, budget=16)
    first = add(scheduler, sid=1, prompt=4)
    late = add(scheduler, sid=2, prompt=6)
    scheduler.complete(scheduler.schedule().chunks)
    for _ in range(4):  # the token of 2 is on its way all the time
        first.num_output_tokens += 1
        plan = scheduler.schedule()
        assert sizes(plan) == {1: 1}
        scheduler.complete(plan.chunks)
    first.num_output_tokens += 1
    assert scheduler.schedule().preempted == (1,)  # though 2 ranks lower
    assert late.num_computed_tokens == 6


def test_removed_sequence_frees_its_blocks_at_once() -> None:
    pool = BlockPool(8, 4)
    scheduler = Scheduler(pool, SchedulerLimits(token_budget=16, max_num_seqs=4))
    add(scheduler, sid=1, prompt=8)
    step(scheduler)
    assert pool.num_free == 6
    assert scheduler.remove(1)
    assert pool.num_free == 8 and scheduler.pending_tokens == 0
    with pytest.raises(KeyError):
        scheduler.sequence(1)


def test_removed_sequence_in_flight_keeps_its_blocks_until_the_step_completes() -> None:
    pool = BlockPool(8, 4)
    scheduler = Scheduler(pool, SchedulerLimits(token_budget=16, max_num_seqs=4))
    add(scheduler, sid=1, prompt=8)
    plan = scheduler.schedule()
    assert scheduler.remove(1)
    assert not scheduler.remove(1)
    assert pool.num_free == 6 and scheduler.pending_tokens == 0
    scheduler.check()
    scheduler.complete(plan.chunks)
    assert pool.num_free == 8 and scheduler.num_running == 0


def test_removing_a_waiting_or_unknown_sequence() -> None:
    scheduler = make_scheduler()
    add(scheduler, sid=1, prompt=8)
    assert scheduler.remove(1)
    assert not scheduler.remove(1)
    assert scheduler.num_waiting == 0 and not scheduler.schedule().chunks


def test_pending_tokens_count_what_is_still_to_be_computed() -> None:
    scheduler = make_scheduler(budget=16)
    add(scheduler, sid=1, prompt=20)
    add(scheduler, sid=2, prompt=5)
    assert scheduler.pending_tokens == 25
    step(scheduler)
    assert scheduler.pending_tokens == 9


def test_step_numbers_count_only_plans_with_work() -> None:
    scheduler = make_scheduler(budget=16)
    assert scheduler.schedule().step == 0
    add(scheduler, sid=1, prompt=20)
    assert [step(scheduler).step for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"), [(0, 4, "prompt"), (4, 0, "max_tokens"), (9, 8, "max_tokens")]
)
def test_request_that_can_never_run_is_refused(prompt: int, max_tokens: int, field: str) -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    with pytest.raises(InvalidRequest) as caught:
        add(scheduler, sid=1, prompt=prompt, max_tokens=max_tokens)
    assert caught.value.field == field
    assert scheduler.num_waiting == 0


def test_request_that_fits_exactly_is_taken() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    sequence = add(scheduler, sid=1, prompt=8, max_tokens=8)
    while sequence.num_output_tokens < 8:
        step(scheduler)
    assert scheduler.num_running == 0 and scheduler.num_preemptions == 0
