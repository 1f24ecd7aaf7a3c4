"""Single events and the commands that they give."""

from dataclasses import replace

import pytest

from placement.errors import FieldError
from placement.planning.residency import Partition, resident
from placement.serving import live
from placement.serving.admission import Draining
from placement.serving.events import (
    Advance,
    Cancel,
    Drain,
    Ended,
    EndReason,
    KvLost,
    Refused,
    Run,
    StepDue,
    StepEnded,
    StepLost,
    Submit,
    Tell,
)
from placement.serving.prefix import chain_hashes
from placement.serving.replica import ReplicaCore
from placement.serving.sequence import TRANSITIONS, Phase, Sequence
from placement.serving.settings import CoreSettings
from placement.serving.step_plan import Chunk, SchedulerLimits, StepLoad, StepPlan
from tests.placement.serving.replica_events import PIPELINE, PROMPT, SETTINGS, end, plan, spec, submit

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


@pytest.mark.parametrize(("settings", "dispatched"), [(SETTINGS, 5 + 1), (PIPELINE, 5)])
def test_tokens_of_a_step_on_its_way_are_pending_once(settings: CoreSettings, dispatched: int) -> None:
    core = ReplicaCore(settings)
    submit(core)
    assert core.load().pending_tokens == 5
    plan(core)
    assert core.load().pending_tokens == dispatched, "a pipeline counts the token to come only once it is known"
    end(core, 1, 6)
    assert core.load().pending_tokens == 1, "the token that it was given"


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
    chain_hashes = live.chain_hashes

    def count(token_ids: tuple[int, ...], block_size: int, salt: bytes) -> list[bytes]:
        hashed.append(len(token_ids))
        return chain_hashes(token_ids, block_size, salt)

    monkeypatch.setattr(live, "chain_hashes", count)
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


def test_a_sequence_that_is_cancelled_while_its_last_token_is_on_its_way_is_not_told_of_it() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core, max_tokens=1)
    plan(core)
    assert core.phase(1) is Phase.LEAVING
    assert core.handle(Cancel(sequence_id=1), 0.0) == [Ended(sequence_id=1, reason=EndReason.CANCELLED)]
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
    assert core.is_idle and core.pool.num_free == core.pool.num_total


def test_a_lost_step_of_a_pipeline_holds_nothing_for_what_was_cancelled_in_it() -> None:
    core = ReplicaCore(PIPELINE)
    submit(core, 1)
    plan(core)
    core.handle(Cancel(sequence_id=1), 0.0)
    core.handle(StepLost(cause="on fire"), 0.0)
    assert core.is_idle and core.pool.num_free == core.pool.num_total


def test_a_sequence_id_is_never_used_again() -> None:
    core = ReplicaCore(PIPELINE)
    submit(core, 1)
    plan(core)
    core.handle(Cancel(sequence_id=1), 0.0)
    (refused,) = submit(core, 1)
    assert isinstance(refused, Refused) and isinstance(refused.error, FieldError)
    assert refused.error.field == "sequence_id"


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


HEADS = resident(
    Partition.KV_HEADS, (1, 1), num_kv_heads=2, block_size=4, num_local_blocks=0, num_remote_blocks=(16, 16)
)


def test_a_sequence_that_is_submitted_again_is_computed_from_where_attention_workers_have_it() -> None:
    text = (*PROMPT, 6, 0, 1, 2, 3, 4)
    names = dict(enumerate(chain_hashes(text, 4, b""), start=7))
    assert list(names) == [7, 8]
    core = ReplicaCore(replace(SETTINGS, residency=HEADS))
    assert core.adopt(names) == 2
    core.handle(Submit(sequence_id=1, spec=spec(max_tokens=9), submitted_s=0.0, emitted_ids=text[5:]), 0.0)
    (chunk,) = plan(core).chunks
    assert (chunk.start, chunk.num_tokens) == (8, 1), "the answer, too, which is replayed from there"
    again = ReplicaCore(SETTINGS)
    again.handle(Submit(sequence_id=1, spec=spec(max_tokens=9), submitted_s=0.0, emitted_ids=text[5:]), 0.0)
    assert plan(again).chunks[0].start == 0


def test_a_run_tells_attention_workers_which_blocks_the_steps_before_it_fill() -> None:
    core = ReplicaCore(replace(SETTINGS, residency=HEADS))
    submit(core, prompt=PROMPT)
    (first,) = core.handle(StepDue(), 0.0)
    (second,) = core.handle(StepDue(), 0.0)
    assert isinstance(first, Run) and isinstance(second, Run)
    assert first.names == () == first.forgotten
    assert second.names == ((0, chain_hashes(PROMPT, 4, b"")[0]),)
    core.handle(KvLost(cause="gone"), 0.0)
    (third,) = core.handle(StepDue(), 0.0)
    assert isinstance(third, Run) and (third.names, third.forgotten) == ((), (0,))


def test_what_was_counted_early_is_uncounted_where_its_step_is_lost() -> None:
    core = ReplicaCore(SETTINGS)
    submit(core, max_tokens=2)
    end(core, plan(core).step, 3)
    last = plan(core)
    assert core.phase(1) is Phase.LEAVING
    assert core.handle(KvLost(cause="gone"), 0.0) == []
    assert core.phase(1) is Phase.WAITING and core.answer(1) == [3]
    assert core.load().num_preemptions == 1 and core.num_ended_steps == last.step
    assert core.load().steps == last.step - 1, "a lost step is no progress"
    again = plan(core)
    assert (again.step, again.chunks[0].start, again.chunks[0].num_tokens) == (last.step + 1, 0, 6)
    told, ended = end(core, again.step, 4)
    assert isinstance(told, Tell) and (told.first_index, told.token_ids) == (1, (4,))
    assert isinstance(ended, Ended) and ended.reason is EndReason.LENGTH
    assert core.is_idle
