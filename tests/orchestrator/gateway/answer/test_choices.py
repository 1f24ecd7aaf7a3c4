"""Several choices of one request: each is whole, ends once, and ends the request with the others."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from google.rpc import code_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.gateway.client import FinishReason
from orchestrator.gateway.request.submission import entries
from protos.heterodyne.v1 import inference_pb2 as public
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.gateway.outputs import (
    FIRST,
    ending,
    finished,
    make_answer,
    take_all,
    token,
)


def test_choices_have_chunks_and_ends_of_their_own() -> None:
    answer, journal = make_answer(num_choices=3, stop=("yz",))
    responses = take_all(
        answer,
        token(0, 0, queue_s=0.5, cached_tokens=0),
        token(0, 1, choice=1, queue_s=1.5, cached_tokens=3),
        token(0, 2, choice=2),
        token(1, 3),
    )
    assert [(r.chunk.choice, r.chunk.text) for r in responses] == [(0, "ad"), (1, "b"), (2, "c")]
    responses = take_all(
        answer, token(1, 24, choice=1), token(2, 25, choice=1), token(2, 4, end=pb.END_REASON_LENGTH), now_s=2.0
    )
    assert [r.chunk.choice for r in responses if r.chunk.text] == [0]
    ends = {r.chunk.choice: r.chunk.end for r in responses if r.chunk.HasField("end")}
    assert sorted(ends) == [0, 1]
    assert (ends[1].matched_stop, ends[1].completion_tokens) == ("yz", 3)
    assert answer.take_released() == [FIRST + 1], "its replica still computes what a stop string ended"
    assert answer.outcome is None and len(journal) == 3
    assert take_all(answer, ending(pb.END_REASON_CANCELLED, choice=1)) == [], "it was asked to"
    responses = take_all(answer, token(1, 5, choice=2, end=pb.END_REASON_STOP), now_s=4.0)
    assert [r.chunk.end.finish_reason for r in responses] == [public.FINISH_REASON_STOP]
    last = finished(answer)
    assert last.finish_reason == public.FINISH_REASON_LENGTH, "of several, if any was cut short"
    assert not last.HasField("matched_stop")
    assert last.usage == public.Usage(prompt_tokens=4, completion_tokens=8, cached_prompt_tokens=0)
    assert (last.timings.queue_s, last.timings.time_to_first_token_s) == (0.75, 1.0)
    # Choice 0 took 1 s for 2 tokens more, choice 1 another for 2, choice 2 three for 1.
    assert last.timings.time_per_output_token_s == pytest.approx(5 / 5)


def test_all_choices_that_stop_make_the_request_stop() -> None:
    answer, _ = make_answer(num_choices=2)
    take_all(answer, *(token(0, 1, choice=choice, end=pb.END_REASON_STOP) for choice in range(2)))
    assert answer.outcome is FinishReason.STOP


@pytest.mark.parametrize(
    "event",
    [
        ending(pb.END_REASON_FAILED, choice=1),
        pb.Rejected(sequence_id=FIRST + 1, code=code_pb2.RESOURCE_EXHAUSTED),
    ],
)
def test_one_choice_that_fails_fails_the_request_and_leaves_the_others_to_be_cancelled(event: Any) -> None:
    answer, _ = make_answer(num_choices=3)
    take_all(answer, token(0, 1), token(0, 1, choice=2, end=pb.END_REASON_STOP))
    take_all(answer, event, token(1, 1))
    last = finished(answer)
    assert last.error.code == code_pb2.UNAVAILABLE
    assert [choice.at_replica for choice in answer.choices] == [True, False, False]
    assert take_all(answer, token(2, 1)) == []


def test_seeds_follow_each_other_and_wrap() -> None:
    request = make_answer(num_choices=3)[0].request
    request = replace(request, seed=2**64 - 2)
    sequences = entries(request, replica="a", epoch=1, sequence_ids=itertools.count(5))
    assert [entry.seed for entry in sequences] == [2**64 - 2, 2**64 - 1, 0]
    assert [entry.sequence_id for entry in sequences] == [5, 6, 7]
    assert all(entry.sampling is request.sampling for entry in sequences)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_however_choices_interleave_each_is_whole_and_ends_once(data: st.DataObject) -> None:
    num_choices = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=num_choices, max_size=num_choices))
    events = data.draw(st.permutations([choice for choice, count in enumerate(lengths) for _ in range(count)]))
    answer, _ = make_answer(num_choices=num_choices)
    position = [0] * num_choices
    responses: list[public.GenerateResponse] = []
    waiting: list[pb.SequenceOutput] = []
    for choice in events:
        index = position[choice]
        position[choice] += 1
        last = position[choice] == lengths[choice]
        waiting.append(token(index, choice, choice=choice, end=pb.END_REASON_STOP if last else None))
        if data.draw(st.booleans()):
            responses += take_all(answer, *waiting)
            waiting.clear()
    responses += take_all(answer, *waiting)
    for choice, length in enumerate(lengths):
        mine = [response.chunk for response in responses if response.chunk.choice == choice]
        assert [item.id for chunk in mine for item in chunk.tokens] == [choice] * length
        assert "".join(chunk.text for chunk in mine) == chr(ord("a") + choice) * length
        assert [chunk.HasField("end") for chunk in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].end.completion_tokens == length
    assert answer.outcome is FinishReason.STOP
    assert finished(answer).usage.completion_tokens == sum(lengths)
