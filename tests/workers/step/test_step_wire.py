"""Checks that a step arrives at other ranks as the leader sent it, and which messages are refused."""

from collections.abc import Callable

import pytest

from kernels.attention import SharedSpan
from placement.errors import InvalidRequest
from placement.measured.exchange import Exchange
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.sampling.sampling import SamplerState, SamplingParams
from workers.step.scoring import ScoredPrompt
from workers.step.types import Batch, SequenceInput
from workers.step.wire import step_batch, step_message

BATCH = Batch(
    sequences=(
        SequenceInput(
            token_ids=[], start=40, runs=((0, 32), (64, 73)), awaits_token=True, samples=True, sequence_id=77
        ),
        SequenceInput(token_ids=[7], start=40, runs=((0, 32), (80, 89)), samples=True),
        SequenceInput(
            token_ids=[3, 1, 4],
            start=0,
            runs=((96, 99),),
            scored=ScoredPrompt(first_index=1, token_ids=[0] * 3, num_top=0),
        ),
    ),
    shared=(SharedSpan(members=(0, 1), first_token=0, num_tokens=32, runs=((0, 32),)),),
    exchange=Exchange.RING,
)


def read(message: pb.Step, number: int = 5) -> Batch:
    return step_batch(message, number=number, vocab_size=509, slot_limit=128)


def test_a_step_arrives_as_it_was_sent() -> None:
    message = pb.Step.FromString(step_message(BATCH, 5).SerializeToString())
    assert read(message) == BATCH


def test_how_tokens_are_sampled_and_what_is_scored_stays_with_the_leader() -> None:
    sampler = SamplerState(SamplingParams(), ())
    scored = ScoredPrompt(first_index=1, token_ids=[11, 12], num_top=4)
    sent = SequenceInput(token_ids=[10, 11, 12], start=0, runs=((0, 3),), samples=True, sampler=sampler, scored=scored)
    (found,) = read(step_message(Batch(sequences=(sent,)), 5)).sequences
    assert found.sampler is None and found.samples
    assert found.scored == ScoredPrompt(first_index=1, token_ids=[0, 0], num_top=0)


def _change(change: Callable[[pb.Step], object]) -> pb.Step:
    message = step_message(BATCH, 5)
    change(message)
    return message


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda step: setattr(step, "number", 6), "step.number"),
        (lambda step: step.ClearField("exchange"), "step.exchange"),
        (lambda step: step.sequences[1].token_ids.__setitem__(0, 509), "step.token_ids"),
        (lambda step: setattr(step.sequences[1], "start", 39), "step.start"),
        (lambda step: setattr(step.sequences[1], "start", -1), "step.start"),
        (lambda step: setattr(step.sequences[0], "awaits_token", False), "step.start"),
        (lambda step: step.sequences[2].runs.__setitem__(1, 129), "step.runs"),
        (lambda step: step.sequences[2].runs.__setitem__(0, -3), "step.runs"),
        (lambda step: step.sequences[2].runs.append(100), "step.runs"),
        (lambda step: setattr(step.sequences[2], "num_scored", 4), "step.first_scored"),
        (lambda step: setattr(step.sequences[2], "first_scored", 0), "step.first_scored"),
        (lambda step: step.shared[0].members.append(3), "step.shared.members"),
        (lambda step: step.shared[0].members.append(1), "step.shared.members"),
        (lambda step: setattr(step.shared[0], "num_tokens", 33), "step.shared.num_tokens"),
        (lambda step: setattr(step.shared[0], "first_token", -1), "step.shared.num_tokens"),
    ],
)
def test_what_no_leader_would_send_is_refused(change: Callable[[pb.Step], object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(_change(change))
    assert caught.value.field == field
