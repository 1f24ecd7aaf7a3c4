"""Nobody does two things at once in the rotation, and once all micro-batches are on their way, nobody waits."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.serving.offload.rotation import (
    Turn,
    attention_slot,
    model_slots,
    moves_between_replicas,
    period_s,
    replica_of,
    slot,
)

MICRO_BATCHES = [2, 3, 4, 5]
NUM_SLICES = 60


def turns(count: int) -> list[Turn]:
    return [Turn(micro_batch=it, index=index) for it in range(count) for index in range(NUM_SLICES)]


@pytest.mark.parametrize("count", MICRO_BATCHES)
def test_each_replica_and_the_attention_workers_do_one_thing_at_a_time(count: int) -> None:
    busy: defaultdict[tuple[object, int], list[Turn]] = defaultdict(list)
    for turn in turns(count):
        for number in model_slots(turn, num_micro_batches=count):
            busy[replica_of(turn, num_micro_batches=count), number].append(turn)
        busy["attention", attention_slot(turn, num_micro_batches=count)].append(turn)
    assert all(len(done) == 1 for done in busy.values())
    assert {who for who, _ in busy} == {"attention", *range(count - 1)}
    for number in range(count - 1, count * NUM_SLICES - count):
        assert all((who, number) in busy for who in ("attention", *range(count - 1))), "somebody waits"


@pytest.mark.parametrize("count", MICRO_BATCHES)
def test_attention_follows_its_slice_and_the_next_slice_follows_attention(count: int) -> None:
    for turn in turns(count):
        attended = attention_slot(turn, num_micro_batches=count)
        following = Turn(micro_batch=turn.micro_batch, index=turn.index + 1)
        assert model_slots(turn, num_micro_batches=count)[-1] + 1 == attended
        assert attended + 1 == model_slots(following, num_micro_batches=count).start


@pytest.mark.parametrize("count", MICRO_BATCHES)
def test_a_slot_says_what_the_turns_say(count: int) -> None:
    for number in range(3 * count * (count - 1) + 2):
        done = slot(number, num_micro_batches=count)
        assert len(done.replicas) == count - 1
        for replica in range(count - 1):
            expected = [
                it
                for it in turns(count)
                if replica_of(it, num_micro_batches=count) == replica
                and number in model_slots(it, num_micro_batches=count)
            ]
            assert [done.replicas[replica]] == (expected or [None])
        attended = [it for it in turns(count) if attention_slot(it, num_micro_batches=count) == number]
        assert [done.attention] == (attended or [None])


def test_two_micro_batches_take_turns_on_one_replica() -> None:
    assert not moves_between_replicas(num_micro_batches=2)
    found = [slot(number, num_micro_batches=2) for number in range(4)]
    assert [it.replicas[0] for it in found] == [
        Turn(micro_batch=0, index=0),
        Turn(micro_batch=1, index=0),
        Turn(micro_batch=0, index=1),
        Turn(micro_batch=1, index=1),
    ]
    assert [it.attention for it in found] == [
        None,
        Turn(micro_batch=0, index=0),
        Turn(micro_batch=1, index=0),
        Turn(micro_batch=0, index=1),
    ]


@pytest.mark.parametrize("count", [3, 4, 5])
def test_with_more_replicas_a_micro_batch_visits_each_in_turn(count: int) -> None:
    assert moves_between_replicas(num_micro_batches=count)
    visited = [replica_of(Turn(micro_batch=1, index=index), num_micro_batches=count) for index in range(count - 1)]
    assert sorted(visited) == list(range(count - 1))


def executed_period_s(count: int, model_s: float, attention_s: float, wire_s: float, num_slices: int) -> float:
    """The mean period where everybody starts as soon as they can, in the order of the schedule."""
    replica_free_s, attention_free_s = [0.0] * max(1, count - 1), 0.0
    ready_s, started_s = [0.0] * count, []
    for index in range(num_slices):
        for micro_batch in range(count):
            turn = Turn(micro_batch=micro_batch, index=index)
            replica = replica_of(turn, num_micro_batches=count) if count > 1 else 0
            start_s = max(ready_s[micro_batch], replica_free_s[replica])
            replica_free_s[replica] = start_s + model_s
            attended_s = max(start_s + model_s + wire_s / 2, attention_free_s)
            attention_free_s = attended_s + attention_s
            ready_s[micro_batch] = attention_free_s + wire_s / 2
            if micro_batch == 0:
                started_s.append(start_s)
    half = num_slices // 2
    return (started_s[-1] - started_s[half - 1]) / (num_slices - half)


@given(
    count=st.integers(1, 5),
    model_s=st.integers(1, 40),
    attention_s=st.integers(1, 40),
    wire_s=st.sampled_from([0, 2, 10, 60]),
)
def test_the_period_is_what_the_schedule_takes(count: int, model_s: int, attention_s: int, wire_s: int) -> None:
    expected_s = period_s(model_s=model_s, attention_s=attention_s, wire_s=wire_s, num_micro_batches=count)
    executed_s = executed_period_s(count, model_s, attention_s, wire_s, 240)
    assert executed_s == pytest.approx(expected_s, rel=0.02)


@pytest.mark.parametrize("count", MICRO_BATCHES)
def test_in_the_papers_proportion_the_wire_alone_delays(count: int) -> None:
    model_s = 1.0 * (count - 1)
    assert period_s(model_s=model_s, attention_s=1, wire_s=0, num_micro_batches=count) == count
    assert period_s(model_s=model_s, attention_s=1, wire_s=0.5, num_micro_batches=count) == count + 0.5
