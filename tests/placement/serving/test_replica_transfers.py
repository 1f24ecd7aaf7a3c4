"""What comes from other replicas, and goes to them: answers to be replayed, keys and values."""

from dataclasses import replace

import pytest

from placement.model.part import Span
from placement.serving import replica
from placement.serving.events import (
    Cancel,
    Ended,
    EndReason,
    HoldLapsed,
    KvArrived,
    KvSent,
    Receive,
    Revoke,
    Ship,
    StepDue,
    Submit,
    Tell,
)
from placement.serving.replica import ReplicaCore
from placement.serving.step_plan import Chunk
from tests.placement.serving.replica_events import PIPELINE, SETTINGS, end, plan, spec, submit
from tests.placement.serving.replica_world import World, continuation

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
    assert receive == Receive(sequence_id=1, hold_id=receive.hold_id, tokens=Span(0, 4), table=[])
    assert receive.table == [0, 1] and core.pool.num_free == core.pool.num_total - 2
    assert not core.wants_step


def test_the_last_token_of_a_prompt_is_computed_here() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core, 1.0)
    assert core.handle(KvArrived(hold_id=receive.hold_id, num_tokens=4), 4.0) == []
    assert plan(core).chunks == (Chunk(sequence_id=1, start=4, num_tokens=1, samples=True),)
    (tell,) = end(core, 1, 6)
    assert isinstance(tell, Tell) and tell.queue_s == 0.0, "the wait for another replica is no wait for this one"


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_what_did_not_come_is_computed_here(num_tokens: int) -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core)
    assert core.handle(KvArrived(hold_id=receive.hold_id, num_tokens=num_tokens), 0.0) == []
    assert plan(core).chunks == (Chunk(sequence_id=1, start=num_tokens, num_tokens=5 - num_tokens, samples=True),)


def test_less_than_a_block_is_computed_here_and_not_asked_for() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core, prompt_ids=(1, 2, 3, 4), awaits_kv=True)
    assert plan(core).chunks == (Chunk(sequence_id=1, start=0, num_tokens=4, samples=True),)


def test_a_prompt_whose_transfer_lapses_is_computed_here() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core)
    assert core.handle(HoldLapsed(hold_id=receive.hold_id), 10.0) == []
    assert plan(core).chunks[0].num_tokens == 5
    assert core.handle(KvArrived(hold_id=receive.hold_id, num_tokens=5), 11.0) == [], "too late"


def test_a_transfer_holds_the_blocks_of_a_cancelled_sequence_until_it_ends() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core)
    assert core.handle(Cancel(sequence_id=1), 0.0) == [
        Ended(sequence_id=1, reason=EndReason.CANCELLED),
        Revoke(hold_id=receive.hold_id),
    ]
    assert core.pool.num_free == core.pool.num_total - 2 and not core.is_idle
    assert core.handle(KvArrived(hold_id=receive.hold_id, num_tokens=5), 0.0) == []
    assert core.is_idle


def test_keys_and_values_are_not_asked_for_while_a_step_may_write_to_their_blocks() -> None:
    """The blocks of the first sequence are given away when its last step is dispatched, and are the only free ones."""
    core = ReplicaCore(replace(SETTINGS, num_blocks=2))
    submit(core, 1, max_tokens=1)
    plan(core)
    submit(core, 2, awaits_kv=True, cache_salt=b"of another text")
    assert core.handle(StepDue(), 0.0) == []
    receive, *told = end(core, 1, 6)
    assert isinstance(receive, Receive) and receive.sequence_id == 2
    assert len(told) == 2


def test_prompts_of_the_same_text_wait_for_the_one_whose_keys_and_values_come() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core)
    submit(core, 2, awaits_kv=True)
    assert core.handle(StepDue(), 0.0) == []
    load = core.load()
    assert (load.num_waiting, load.num_moving) == (1, 1)
    assert load.pending_tokens == 1 + 5, "of what comes, only the last token is computed here"
    core.handle(KvArrived(hold_id=receive.hold_id, num_tokens=4), 0.0)
    assert plan(core).chunks == (
        Chunk(sequence_id=1, start=4, num_tokens=1, samples=True),
        Chunk(sequence_id=2, start=4, num_tokens=1, samples=True),
    ), "the second finds the block that came"


def test_who_computes_its_own_prompt_waits_for_nobody_elses_transfer() -> None:
    core = ReplicaCore(SETTINGS)
    receive = awaiting(core)
    submit(core, 2, priority=9)
    assert plan(core).chunks == (Chunk(sequence_id=2, start=0, num_tokens=5, samples=True),)
    end(core, 1, 6)
    core.handle(KvArrived(hold_id=receive.hold_id, num_tokens=4), 0.0)
    assert {chunk.sequence_id for chunk in plan(core).chunks} == {1, 2}


def test_who_waits_for_the_prompt_of_a_cancelled_sequence_asks_for_its_own() -> None:
    core = ReplicaCore(SETTINGS)
    awaiting(core)
    submit(core, 2, awaits_kv=True)
    core.handle(StepDue(), 0.0)
    core.handle(Cancel(sequence_id=1), 0.0)
    (receive,) = core.handle(StepDue(), 0.0)
    assert isinstance(receive, Receive) and receive.sequence_id == 2


def test_keys_and_values_that_are_here_are_not_asked_for() -> None:
    world = World(SETTINGS)
    world.submit(spec((1, 2, 3, 4), max_tokens=2))
    world.settle()
    first = continuation((1, 2, 3, 4), 1)
    world.submit(spec((1, 2, 3, 4), max_tokens=3, awaits_kv=True), 1)
    assert world.plan() and not world.incoming
    world.settle()
    assert [*first, *world.texts[1].told] == continuation((1, 2, 3, 4), 3)


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
    assert (ship.tokens, ship.table) == (Span(0, 5), [0, 1])
    assert core.pool.num_free == core.pool.num_total - 2
    assert core.handle(KvSent(hold_id=ship.hold_id), 0.0) == [Ended(sequence_id=1, reason=EndReason.SHIPPED)]
    assert core.is_idle and core.pool.num_free == core.pool.num_total


def test_a_prompt_whose_last_step_executes_is_computed_and_does_not_move() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core, max_tokens=1, ship_to="decode-0")
    plan(core)
    assert (core.load().num_running, core.load().num_moving) == (1, 0)
    end(core, 1, 6)
    assert (core.load().num_running, core.load().num_moving) == (0, 1)


def test_a_prompt_that_nobody_takes_fails_when_its_transfer_lapses(core: ReplicaCore) -> None:
    ship = shipping(core)
    (ended,) = core.handle(HoldLapsed(hold_id=ship.hold_id), 10.0)
    assert ended == Ended(sequence_id=1, reason=EndReason.FAILED, detail=replica.LATE_TRANSFER)
    assert core.is_idle


def test_a_cancelled_prompt_that_is_sent_holds_its_blocks_until_that_has_ended(core: ReplicaCore) -> None:
    ship = shipping(core)
    assert core.handle(Cancel(sequence_id=1), 0.0) == [
        Ended(sequence_id=1, reason=EndReason.CANCELLED),
        Revoke(hold_id=ship.hold_id),
    ]
    assert core.pool.num_free == core.pool.num_total - 2
    assert core.handle(KvSent(hold_id=ship.hold_id), 0.0) == []
    assert core.is_idle


def test_a_prompt_whose_first_token_ends_the_answer_is_not_sent(core: ReplicaCore) -> None:
    submit(core, max_tokens=1, ship_to="decode-0", stop_token_ids=frozenset({6}))
    plan(core)
    assert end(core, 1, 6)[1:] == [Ended(sequence_id=1, reason=EndReason.STOP)]
    assert core.is_idle
