"""The echo of a prompt: with scores as they come, before the answer, and each token once."""

import itertools
from typing import Any

import pytest
from google.rpc import code_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.heterodyne.v1 import inference_pb2 as public
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.gateway.outputs import (
    FIRST,
    PROMPT,
    finished,
    judged,
    letters,
    make_answer,
    opening,
    take,
    take_all,
    token,
)


def test_the_prompt_is_echoed_at_once_where_no_logprobs_are_asked_for() -> None:
    answer, _ = make_answer(echo=True)
    (response,) = opening(answer)
    assert [item.id for item in response.echo.tokens] == list(PROMPT)
    assert not any(item.HasField("logprob") for item in response.echo.tokens)
    assert (response.echo.first_index, response.echo.text) == (0, "hijk")
    assert take(answer, token(0, 3)) is not None


def test_without_echo_nothing_precedes_the_answer() -> None:
    assert opening(make_answer()[0]) == []


def test_a_judged_prompt_comes_as_it_is_computed_and_before_the_answer() -> None:
    answer, _ = make_answer(echo=True, logprobs=2)
    assert opening(answer) == []
    (one,) = take_all(answer, judged(1, 2, num_top=2))
    assert (one.echo.first_index, one.echo.text, len(one.echo.tokens)) == (0, "hij", 3)
    first, second, third = one.echo.tokens
    assert not first.HasField("logprob") and not first.top
    assert (second.logprob, third.logprob) == (-1.0, -2.0)
    assert [(item.token_id, item.logprob) for item in third.top] == [(2, -2.0), (3, -3.0)]
    two, chunk = take_all(answer, judged(3, 1, num_top=2, index=0, token_id=3))
    assert (two.echo.first_index, two.echo.text, two.echo.tokens[0].logprob) == (3, "k", -3.0)
    assert chunk.chunk.text == "d"


def test_what_a_preempted_sequence_judges_again_is_sent_once() -> None:
    answer, _ = make_answer(echo=True, logprobs=0)
    take_all(answer, judged(1, 2, num_top=0))
    (response,) = take_all(answer, judged(1, 3, num_top=0))
    assert (response.echo.first_index, [item.logprob for item in response.echo.tokens]) == (3, [-3.0])
    assert take_all(answer, judged(1, 3, num_top=0)) == []
    assert answer.outcome is None


def test_other_choices_wait_for_the_echo() -> None:
    answer, _ = make_answer(echo=True, logprobs=0, num_choices=2)
    assert take_all(answer, token(0, 1, choice=1), token(1, 2, choice=1, end=pb.END_REASON_STOP)) == []
    echo, mine, other = take_all(answer, judged(1, 3, num_top=0), token(0, 5))
    assert echo.echo.text == "hijk"
    assert (mine.chunk.text, other.chunk.text) == ("f", "bc")
    assert other.chunk.HasField("end")


@pytest.mark.parametrize(
    "events",
    [
        (judged(2, 1),),
        (judged(0, 2),),
        (judged(1, 4),),
        (judged(1, 1), judged(3, 1)),
        (pb.SequenceOutput(sequence_id=FIRST, prompt=pb.PromptLogprobs(first_index=1, logprobs=[0], top_ids=[1])),),
        (judged(1, 1), token(0, 1)),
    ],
)
def test_an_echo_with_gaps_or_too_much_or_too_late_is_the_replicas_fault(events: tuple[Any, ...]) -> None:
    answer, _ = make_answer(echo=True, logprobs=1)
    responses = take_all(answer, *events)
    assert not any(response.HasField("chunk") for response in responses)
    assert finished(answer).error.code == code_pb2.INTERNAL


def test_a_prompt_of_one_token_has_nothing_to_be_judged() -> None:
    answer, _ = make_answer(echo=True, logprobs=3, prompt_ids=(4,))
    (response,) = opening(answer)
    assert list(response.echo.tokens) == [public.Token(id=4)]
    assert take(answer, token(0, 3)) is not None


@given(st.integers(1, 3000), st.data())
@settings(deadline=None, max_examples=30)
def test_an_echo_has_every_token_once_in_messages_of_bounded_size(length: int, data: st.DataObject) -> None:
    prompt_ids = tuple(index % 26 for index in range(length))
    answer, _ = make_answer(echo=True, logprobs=1, prompt_ids=prompt_ids)
    responses, position = opening(answer), 1
    while position < length:
        count = data.draw(st.integers(1, length - position))
        responses += take_all(answer, judged(position, count))
        position += count
    sent = [item for response in responses for item in response.echo.tokens]
    assert [item.id for item in sent] == list(prompt_ids)
    assert [item.logprob for item in sent[1:]] == [-float(index) for index in range(1, length)]
    assert "".join(response.echo.text for response in responses) == letters().decode(list(prompt_ids))
    assert [response.echo.first_index for response in responses] == list(
        itertools.accumulate((len(response.echo.tokens) for response in responses[:-1]), initial=0)
    )
    assert max(len(response.echo.tokens) for response in responses) <= 512


@pytest.mark.parametrize("reason", [pb.END_REASON_LENGTH, pb.END_REASON_STOP])
def test_looking_at_the_prompt_only_shows_no_token(reason: "pb.EndReason.ValueType") -> None:
    answer, _ = make_answer(echo=True, max_tokens=0)
    assert [len(response.echo.tokens) for response in opening(answer)] == [4]
    assert answer.choices[0].entry.max_tokens == 1, "a replica computes a prompt to draw a token"
    chunk = take(answer, token(0, 3, end=reason, queue_s=0.5, cached_tokens=1))
    assert chunk is not None and not chunk.tokens and not chunk.text
    assert chunk.end == public.ChoiceEnd(finish_reason=public.FINISH_REASON_LENGTH, completion_tokens=0)
    last = finished(answer)
    assert last.finish_reason == public.FINISH_REASON_LENGTH
    assert last.usage == public.Usage(prompt_tokens=4, completion_tokens=0, cached_prompt_tokens=1)
    assert last.timings.queue_s == 0.75 and not last.timings.HasField("time_to_first_token_s")
