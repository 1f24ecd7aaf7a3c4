"""Single events and the commands that they give."""

from dataclasses import replace

import pytest

from placement.errors import FieldError
from placement.model.part import Span
from placement.serving import replica
from placement.serving.admission import Draining, Limits
from placement.serving.events import (
    Advance,
    Cancel,
    Command,
    Drain,
    Ended,
    EndReason,
    HoldLapsed,
    KvArrived,
    KvSent,
    Receive,
    Refused,
    Run,
    SequenceSpec,
    Ship,
    StepDue,
    StepEnded,
    StepLost,
    Submit,
    Tell,
)
from placement.serving.replica import ReplicaCore
from placement.serving.sequence import TRANSITIONS, Phase, Sequence
from placement.serving.settings import Checks, CoreSettings
from placement.serving.step_plan import Chunk, SchedulerLimits, StepLoad, StepPlan
from tests.support.replica_world import World, continuation

SETTINGS = CoreSettings(
    limits=Limits(max_context_tokens=64, vocab_size=7, block_size=4),
    steps=SchedulerLimits(token_budget=16, max_num_seqs=4),
    num_blocks=16,
    lease_s=10.0,
    checks=Checks.ALWAYS,
)
PIPELINE = replace(SETTINGS, steps=SchedulerLimits(token_budget=16, max_num_seqs=4, num_batches=2))
PROMPT = (1, 2, 3, 4, 5)


def spec(prompt: tuple[int, ...] = PROMPT, **more: object) -> SequenceSpec:
    fields: dict[str, object] = {"prompt_ids": prompt, "max_tokens": 3} | more
    return SequenceSpec(**fields)  # type: ignore[arg-type]


def submit(core: ReplicaCore, sequence_id: int = 1, *, at_s: float = 0.0, **more: object) -> list[Command]:
    event = Submit(sequence_id=sequence_id, spec=spec(**more), submitted_s=at_s)  # type: ignore[arg-type]
    return core.handle(event, at_s)


def plan(core: ReplicaCore, now_s: float = 0.0) -> StepPlan:
    (run,) = core.handle(StepDue(), now_s)
    assert isinstance(run, Run)
    return run.plan


def end(core: ReplicaCore, step: int, *tokens: int, now_s: float = 0.0) -> list[Command]:
    advances = [Advance(token_ids=(token,)) if token >= 0 else Advance() for token in tokens]
    return core.handle(StepEnded(step=step, advances=advances), now_s)


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_computed_and_its_first_token_told_with_its_times() -> None:
    core = ReplicaCore(SETTINGS)
    assert submit(core, at_s=1.0) == []
    (run,) = core.handle(StepDue(), 3.0)
    chunk = Chunk(sequence_id=1, start=0, num_tokens=5, samples=True)
    assert run == Run(plan=StepPlan(step=1, chunks=(chunk,), preempted=()), token_ids=(list(PROMPT),), tables=([0, 1],))
    assert end(core, 1, 6, now_s=7.0) == [
        Tell(
            sequence_id=1,
            place=0,
            first_index=0,
            token_ids=(6,),
            queue_s=2.0,
            prefill_s=4.0,
            cached_tokens=0,
        )
    ]


def test_the_next_step_is_planned_before_its_token_is_known() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core)
    plan(core)
    (run,) = core.handle(StepDue(), 0.0)
    assert isinstance(run, Run)
    assert run.plan.chunks == (Chunk(sequence_id=1, start=5, num_tokens=1, samples=True, is_decode=True),)
    assert run.token_ids == ([],)
    assert not core.wants_step, "one step executes, and one waits"


def test_blocks_are_given_away_when_the_last_step_that_touches_them_is_dispatched() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core, max_tokens=1)
    plan(core)
    assert core.pool.num_free == core.pool.num_total
    assert core.load().num_running == 1, "its last token is not known"
    assert end(core, 1, 6)[-1] == Ended(sequence_id=1, reason=EndReason.LENGTH)
    assert core.is_idle


def test_a_pipeline_has_a_sequence_in_one_step_at_a_time() -> None:
    core = ReplicaCore(PIPELINE)
    submit(core)
    plan(core)
    assert core.handle(StepDue(), 0.0) == []
    assert not core.wants_step, "nothing to compute until something changes"
    end(core, 1, 6)
    assert plan(core).chunks[0].start == 5


def test_a_step_may_give_a_pipelines_sequence_several_tokens() -> None:
    core = ReplicaCore(PIPELINE)
    submit(core, max_tokens=9)
    plan(core)
    (tell,) = core.handle(StepEnded(step=1, advances=[Advance(token_ids=(6, 0, 6))]), 0.0)
    assert isinstance(tell, Tell) and (tell.first_index, tell.token_ids) == (0, (6, 0, 6))
    assert plan(core).chunks == (Chunk(sequence_id=1, start=5, num_tokens=3, samples=True),)


@pytest.mark.parametrize(
    ("given", "told", "reason"),
    [
        ((6, 0, 6, 6), (6, 0, 6), EndReason.LENGTH),
        ((6, 2, 6), (6, 2), EndReason.STOP),
    ],
)
def test_tokens_behind_the_end_are_dropped(given: tuple[int, ...], told: tuple[int, ...], reason: EndReason) -> None:
    core = ReplicaCore(PIPELINE)
    submit(core, stop_token_ids=frozenset({2}))
    plan(core)
    tell, ended = core.handle(StepEnded(step=1, advances=[Advance(token_ids=given)]), 0.0)
    assert isinstance(tell, Tell) and tell.token_ids == told
    assert ended == Ended(sequence_id=1, reason=reason)


def test_an_answer_that_is_complete_stops() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core)
    plan(core)
    commands = core.handle(StepEnded(step=1, advances=[Advance(token_ids=(6,), is_complete=True)]), 0.0)
    assert commands[-1] == Ended(sequence_id=1, reason=EndReason.STOP)


def test_a_sequence_that_cannot_go_on_fails_and_its_batch_mate_goes_on() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core, 1)
    submit(core, 2, prompt=(3, 3))
    plan(core)
    failed, told = core.handle(StepEnded(step=1, advances=[Advance(failed="no"), Advance(token_ids=(1,))]), 0.0)
    assert failed == Ended(sequence_id=1, reason=EndReason.FAILED, detail="no")
    assert isinstance(told, Tell) and (told.sequence_id, told.place) == (2, 1)


def test_the_choices_of_a_request_hash_its_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    chain_hashes = replica.chain_hashes

    def count(token_ids: tuple[int, ...], block_size: int, salt: bytes) -> list[bytes]:
        hashed.append(len(token_ids))
        return chain_hashes(token_ids, block_size, salt)

    monkeypatch.setattr(replica, "chain_hashes", count)
    core = ReplicaCore(SETTINGS)
    for sequence_id in range(3):
        submit(core, sequence_id)
    assert hashed == [5]
    submit(core, 3, cache_salt=b"other")
    assert hashed == [5, 5]


# -- the load of a step -----------------------------------------------------------------------------------------------


def test_the_last_token_of_a_prompt_is_no_decode() -> None:
    core = ReplicaCore(replace(SETTINGS, steps=SchedulerLimits(token_budget=4, max_num_seqs=4)))
    submit(core)
    plan(core)
    last = plan(core)
    assert last.chunks == (Chunk(sequence_id=1, start=4, num_tokens=1, samples=True),)
    assert last.load == StepLoad(num_prefill_tokens=1, prefill_pairs=5)


def test_the_load_of_a_step_counts_what_it_reads() -> None:
    chunks = (
        Chunk(sequence_id=1, start=9, num_tokens=1, samples=True, is_decode=True),
        Chunk(sequence_id=2, start=4, num_tokens=1, samples=True, is_decode=True),
        Chunk(sequence_id=3, start=2, num_tokens=3, samples=False),
    )
    load = StepPlan(step=1, chunks=chunks, preempted=()).load
    assert load == StepLoad(num_decodes=2, num_prefill_tokens=3, decode_context_tokens=10 + 5, prefill_pairs=3 + 4 + 5)
    assert load.num_tokens == 5


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_sequence_ends_at_once_and_nothing_more_is_said_of_it() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core)
    plan(core)
    assert core.handle(Cancel(sequence_id=1), 0.0) == [Ended(sequence_id=1, reason=EndReason.CANCELLED)]
    assert core.handle(Cancel(sequence_id=1), 0.0) == []
    assert end(core, 1, 6) == []
    assert core.is_idle


def test_a_pipelines_step_holds_the_blocks_of_what_was_cancelled_in_it() -> None:
    core = ReplicaCore(PIPELINE)
    submit(core)
    plan(core)
    core.handle(Cancel(sequence_id=1), 0.0)
    assert core.pool.num_free == core.pool.num_total - 2
    end(core, 1, 6)
    assert core.pool.num_free == core.pool.num_total


def test_a_draining_replica_takes_what_was_admitted_before_and_nothing_else() -> None:
    core = ReplicaCore(SETTINGS)
    assert core.handle(Drain(), 0.0) == []
    (refused,) = submit(core)
    assert isinstance(refused, Refused) and isinstance(refused.error, Draining)
    assert core.handle(Submit(sequence_id=2, spec=spec(), submitted_s=0.0, admitted=True), 0.0) == []


def test_a_lost_step_ends_everything_and_what_comes_later() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core, 1)
    plan(core)
    submit(core, 2)
    failed = [Ended(sequence_id=i, reason=EndReason.FAILED, detail="on fire") for i in (1, 2)]
    assert core.handle(StepLost(cause="on fire"), 0.0) == failed
    assert submit(core, 3) == [Ended(sequence_id=3, reason=EndReason.FAILED, detail="on fire")]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (Submit(sequence_id=1, spec=spec(()), submitted_s=0.0), "prompt"),
        (Submit(sequence_id=1, spec=spec((7,)), submitted_s=0.0), "prompt_ids"),
        (Submit(sequence_id=1, spec=spec(max_tokens=60), submitted_s=0.0), "max_tokens"),
        (Submit(sequence_id=1, spec=spec(), submitted_s=0.0, emitted_ids=(1, 2, 3)), "emitted_ids"),
        (Submit(sequence_id=1, spec=spec(ship_to="decode-0"), submitted_s=0.0), "ship_to"),
        (Submit(sequence_id=0, spec=spec(), submitted_s=0.0), "sequence_id"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(bad: Submit, field: str) -> None:
    core = ReplicaCore(SETTINGS)
    submit(core, 0)
    (refused,) = core.handle(bad, 0.0)
    assert isinstance(refused, Refused) and isinstance(refused.error, FieldError)
    assert refused.error.field == field


# -- replay -----------------------------------------------------------------------------------------------------------


def test_an_answer_begun_elsewhere_is_replayed_as_decodes_and_not_told_again() -> None:
    core = ReplicaCore(SETTINGS)
    core.handle(Submit(sequence_id=1, spec=spec(max_tokens=4), submitted_s=0.0, emitted_ids=(6, 5, 4)), 0.0)
    plans = [plan(core)]
    for step in range(1, 4):
        assert end(core, step, -1) == []
        plans.append(plan(core))
    chunks = [chunk for made in plans for chunk in made.chunks]
    assert chunks == [
        Chunk(sequence_id=1, start=0, num_tokens=5, samples=False),
        Chunk(sequence_id=1, start=5, num_tokens=1, samples=False, is_decode=True),
        Chunk(sequence_id=1, start=6, num_tokens=1, samples=False, is_decode=True),
        Chunk(sequence_id=1, start=7, num_tokens=1, samples=True, is_decode=True),
    ]
    tell, ended = end(core, 4, 3)
    assert isinstance(tell, Tell) and (tell.first_index, tell.token_ids) == (3, (3,))
    assert tell.queue_s is not None, "it is the first that is said here"
    assert ended == Ended(sequence_id=1, reason=EndReason.LENGTH)


def test_a_replayed_answer_takes_no_blocks_that_others_computed_of_it() -> None:
    world = World(SETTINGS)
    prompt = (1, 2, 3)
    world.submit(spec(prompt, max_tokens=8))
    world.settle()
    answer = continuation(prompt, 8)
    world.submit(spec(prompt, max_tokens=9), 8)
    world.plan()
    (chunk,) = world.steps[0].run.plan.chunks
    assert (chunk.start, chunk.num_tokens) == (0, 3), "of its second block, all but the prompt is in no way reused"
    world.settle()
    assert world.texts[1].told == continuation((*prompt, *answer), 1)


# -- keys and values from elsewhere -----------------------------------------------------------------------------------


def awaiting(core: ReplicaCore, now_s: float = 0.0) -> Receive:
    submit(core, awaits_kv=True, at_s=now_s)
    (receive,) = core.handle(StepDue(), now_s)
    assert isinstance(receive, Receive)
    return receive


def test_blocks_are_reserved_before_keys_and_values_are_asked_for() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core, 2.0)
    assert receive == Receive(sequence_id=1, hold_id=receive.hold_id, tokens=Span(0, 5), lapses_s=12.0, table=[])
    assert receive.table == [0, 1] and core.pool.num_free == core.pool.num_total - 2
    assert core.transfers.next_lapse_s == 12.0
    assert not core.wants_step


def test_a_sequence_whose_keys_and_values_came_with_a_token_decodes() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core)
    arrived = KvArrived(hold_id=receive.hold_id, num_tokens=5, advance=Advance(token_ids=(6,)))
    (tell,) = core.handle(arrived, 4.0)
    assert isinstance(tell, Tell) and (tell.place, tell.token_ids, tell.queue_s) == (None, (6,), 4.0)
    assert plan(core).chunks == (Chunk(sequence_id=1, start=5, num_tokens=1, samples=True, is_decode=True),)


def test_what_did_not_come_is_computed_here() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core)
    assert core.handle(KvArrived(hold_id=receive.hold_id, num_tokens=4), 0.0) == []
    assert plan(core).chunks == (Chunk(sequence_id=1, start=4, num_tokens=1, samples=True),)


def test_a_prompt_whose_transfer_lapses_is_computed_here() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core)
    assert core.transfers.lapsed(9.9) == []
    (lapsed,) = core.transfers.lapsed(10.0)
    assert lapsed == HoldLapsed(hold_id=receive.hold_id)
    assert core.handle(lapsed, 10.0) == []
    assert plan(core).chunks[0].num_tokens == 5
    assert core.handle(KvArrived(hold_id=receive.hold_id, num_tokens=5), 11.0) == [], "too late"


def test_a_transfer_holds_the_blocks_of_a_cancelled_sequence_until_it_ends() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core)
    assert core.handle(Cancel(sequence_id=1), 0.0) == [Ended(sequence_id=1, reason=EndReason.CANCELLED)]
    assert core.pool.num_free == core.pool.num_total - 2 and not core.is_idle
    assert core.handle(KvArrived(hold_id=receive.hold_id, num_tokens=5), 0.0) == []
    assert core.is_idle


def test_keys_and_values_are_not_asked_for_while_a_step_may_write_to_their_blocks() -> None:
    """The blocks of the first sequence are given away when its last step is dispatched, and are the only free ones."""
    core = ReplicaCore(replace(SETTINGS, num_blocks=2))
    submit(core, 1, max_tokens=1)
    plan(core)
    submit(core, 2, awaits_kv=True)
    assert core.handle(StepDue(), 0.0) == []
    receive, *told = end(core, 1, 6)
    assert isinstance(receive, Receive) and receive.sequence_id == 2
    assert len(told) == 2


# -- keys and values for elsewhere ------------------------------------------------------------------------------------


def shipping(core: ReplicaCore) -> Ship:
    submit(core, max_tokens=1, ship_to="decode-0")
    plan(core)
    tell, ship = end(core, 1, 6)
    assert isinstance(tell, Tell) and isinstance(ship, Ship)
    return ship


@pytest.fixture(params=[SETTINGS, PIPELINE], ids=["in order", "pipeline"])
def core(request: pytest.FixtureRequest) -> ReplicaCore:
    return ReplicaCore(request.param)


def test_a_computed_prompt_is_sent_and_its_blocks_are_held_until_it_is_there(core: ReplicaCore) -> None:
    ship = shipping(core)
    assert (ship.tokens, ship.destination, ship.table) == (Span(0, 5), "decode-0", [0, 1])
    assert core.pool.num_free == core.pool.num_total - 2
    assert core.handle(KvSent(hold_id=ship.hold_id), 0.0) == [Ended(sequence_id=1, reason=EndReason.SHIPPED)]
    assert core.is_idle and core.pool.num_free == core.pool.num_total


def test_a_prompt_that_nobody_takes_fails_when_its_transfer_lapses(core: ReplicaCore) -> None:
    ship = shipping(core)
    (ended,) = core.handle(HoldLapsed(hold_id=ship.hold_id), 10.0)
    assert ended == Ended(sequence_id=1, reason=EndReason.FAILED, detail=replica.LATE_TRANSFER)
    assert core.is_idle


def test_a_cancelled_prompt_that_is_sent_holds_its_blocks_until_that_has_ended(core: ReplicaCore) -> None:
    ship = shipping(core)
    assert core.handle(Cancel(sequence_id=1), 0.0) == [Ended(sequence_id=1, reason=EndReason.CANCELLED)]
    assert core.pool.num_free == core.pool.num_total - 2
    assert core.handle(KvSent(hold_id=ship.hold_id), 0.0) == []
    assert core.is_idle


def test_a_prompt_whose_first_token_ends_the_answer_is_not_sent(core: ReplicaCore) -> None:
    submit(core, max_tokens=1, ship_to="decode-0", stop_token_ids=frozenset({6}))
    plan(core)
    assert end(core, 1, 6)[1:] == [Ended(sequence_id=1, reason=EndReason.STOP)]
    assert core.is_idle


# -- phases -----------------------------------------------------------------------------------------------------------


def test_every_phase_has_its_transitions_and_no_other_is_possible() -> None:
    assert TRANSITIONS.keys() == set(Phase)
    for phase, after in TRANSITIONS.items():
        for other in Phase:
            sequence = Sequence(sequence_id=0, num_prompt_tokens=1, max_tokens=1, arrival=0, phase=phase)
            if other in after:
                sequence.enter(other)
                assert sequence.phase is other
            else:
                with pytest.raises(AssertionError):
                    sequence.enter(other)
