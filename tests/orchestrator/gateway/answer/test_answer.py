"""One answer: what a replica may say, in good and in bad order, and what the client gets to see of it."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from google.rpc import code_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from orchestrator.gateway.answer.answer import Answer
from orchestrator.gateway.answer.choice import Choice
from orchestrator.gateway.answer.detokenizer import Detokenizer
from orchestrator.gateway.answer.echo import Echo
from orchestrator.gateway.answer.text import TextStream
from orchestrator.gateway.client import FinishReason
from orchestrator.gateway.errors import DeadlineExceeded
from orchestrator.gateway.fleet.inbox import Lost
from orchestrator.gateway.fleet.journal import Journal
from orchestrator.gateway.grpc_client import response_of
from orchestrator.gateway.request.request import Request
from orchestrator.gateway.request.submission import entries
from orchestrator.gateway.status import code_of
from placement.errors import HeterodyneError
from protos.heterodyne.v1 import inference_pb2 as public
from protos.heterodyne.worker.v1 import worker_pb2 as pb

EPOCH = 3
SAMPLING = pb.Sampling(top_p=1.0, repetition_penalty=1.0)


def letters() -> Tokenizer:
    """Id i is the letter of that number."""
    vocabulary = {chr(ord("a") + i): i for i in range(26)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


PROMPT = (7, 8, 9, 10)
FIRST = 7  # the sequence of the first choice


def make_answer(
    *,
    stop: tuple[str, ...] = (),
    epoch: int = EPOCH,
    num_choices: int = 1,
    max_tokens: int = 10,
    logprobs: int | None = None,
    echo: bool = False,
    prompt_ids: tuple[int, ...] = PROMPT,
    grammar: pb.Grammar | None = None,
) -> tuple[Answer, Journal]:
    request = Request(
        request_id="r",
        prompt_ids=prompt_ids,
        sampling=SAMPLING,
        seed=1,
        max_tokens=max_tokens,
        stop=stop,
        stop_token_ids=(),
        logprobs=logprobs,
        priority=0,
        num_choices=num_choices,
        echo=echo,
        grammar=grammar,
    )
    journal, choices = Journal(), []
    sequences = entries(request, replica="replica-0", epoch=EPOCH, sequence_ids=itertools.count(FIRST))
    for index, entry in enumerate(sequences):
        journal.open(entry)
        text = TextStream(Detokenizer(letters()), stop, prompt_ids)
        choices.append(Choice(index=index, entry=entry, epoch=epoch, max_tokens=max_tokens, journal=journal, text=text))
    shown = Echo(prompt_ids, TextStream(Detokenizer(letters()), (), ()), judged=logprobs is not None) if echo else None
    return Answer(request=request, choices=choices, echo=shown), journal


def token(
    index: int, token_id: int, *, end: "pb.EndReason.ValueType | None" = None, choice: int = 0, **fields: Any
) -> pb.SequenceOutput:
    message = pb.SequenceOutput(sequence_id=FIRST + choice, index=index, token_id=token_id, **fields)
    if end is not None:
        message.end.reason = end
    return message


def ending(reason: pb.EndReason.ValueType, *, choice: int = 0, detail: str = "") -> pb.SequenceOutput:
    return pb.SequenceOutput(sequence_id=FIRST + choice, end=pb.End(reason=reason, detail=detail))


def refusal(**fields: str) -> pb.Rejected:
    return pb.Rejected(sequence_id=FIRST, code=code_pb2.INVALID_ARGUMENT, **fields)


def take_all(answer: Answer, *events: Any, now_s: float = 1.0) -> list[public.GenerateResponse]:
    """What the client is sent, as the public service writes it."""
    return [response_of(event) for event in answer.take(list(events), submitted_s=0.25, now_s=now_s)]


def take(answer: Answer, *events: Any, now_s: float = 1.0) -> public.Chunk | None:
    responses = take_all(answer, *events, now_s=now_s)
    assert len(responses) <= 1
    return responses[0].chunk if responses else None


def finished(answer: Answer) -> public.Finished:
    return response_of(answer.finished(total_s=3.0)).finished


def opening(answer: Answer) -> list[public.GenerateResponse]:
    return [response_of(event) for event in answer.opening()]


def test_several_tokens_make_one_chunk_and_the_end_its_reason() -> None:
    answer, _ = make_answer()
    chunk = take(answer, token(0, 3, queue_s=0.5, cached_tokens=2), token(1, 4))
    assert chunk is not None and (chunk.first_index, chunk.text) == (0, "de")
    chunk = take(answer, token(2, 5, end=pb.END_REASON_LENGTH), now_s=2.0)
    assert chunk is not None and (chunk.first_index, chunk.text) == (2, "f")
    assert chunk.end == public.ChoiceEnd(finish_reason=public.FINISH_REASON_LENGTH, completion_tokens=3)
    last = finished(answer)
    assert last.finish_reason == public.FINISH_REASON_LENGTH
    assert last.usage == public.Usage(prompt_tokens=4, completion_tokens=3, cached_prompt_tokens=2)
    assert (last.timings.queue_s, last.timings.time_to_first_token_s, last.timings.total_s) == (0.75, 1.0, 3.0)
    assert last.timings.time_per_output_token_s == 0.5
    assert not answer.choices[0].at_replica and answer.let_go() == []


def test_after_a_stop_string_nothing_more_is_taken_and_the_replica_is_to_be_told() -> None:
    answer, _ = make_answer(stop=("ef",))
    chunk = take(answer, token(0, 3), token(1, 4), token(2, 5), token(3, 6))
    assert chunk is not None and chunk.text == "d"
    assert [item.id for item in chunk.tokens] == [3, 4, 5]
    assert (chunk.end.matched_stop, chunk.end.completion_tokens) == ("ef", 3)
    assert answer.let_go() == [FIRST], "it must be cancelled there"
    assert answer.let_go() == [], "once"
    assert answer.choices[0].entry.emitted_ids == [3, 4, 5], "the journal forgets what was not shown"
    last = finished(answer)
    assert (last.finish_reason, last.matched_stop) == (public.FINISH_REASON_STOP, "ef")
    assert last.usage.completion_tokens == 3
    assert take(answer, token(4, 7)) is None


def test_a_chunk_is_of_bounded_size() -> None:
    answer, _ = make_answer(max_tokens=3000)
    outputs = [pb.SequenceOutput(sequence_id=FIRST, index=index, token_id=index % 26) for index in range(2500)]
    outputs[-1].end.reason = pb.END_REASON_LENGTH
    chunks = [response.chunk for response in take_all(answer, *outputs)]
    assert [(chunk.first_index, len(chunk.tokens)) for chunk in chunks] == [(0, 1024), (1024, 1024), (2048, 452)]
    assert [chunk.HasField("end") for chunk in chunks] == [False, False, True]
    assert len("".join(chunk.text for chunk in chunks)) == 2500


def test_a_gap_ends_the_request_and_passes_nothing_on() -> None:
    answer, _ = make_answer()
    assert take(answer, token(1, 4)) is None
    assert isinstance(answer.outcome, HeterodyneError) and code_of(answer.outcome) == code_pb2.INTERNAL


def test_a_repeat_is_dropped() -> None:
    answer, _ = make_answer()
    take(answer, token(0, 3))
    assert take(answer, token(0, 3)) is None
    assert answer.outcome is None


def test_tokens_of_an_incarnation_that_lost_the_request_are_fenced() -> None:
    answer, journal = make_answer()
    take(answer, token(0, 3))
    journal.move(7, replica="replica-1", epoch=EPOCH + 1)
    assert take(answer, token(1, 4)) is None
    assert journal.num_fenced == 1
    assert answer.outcome is None


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (Lost(cause="ipv4:10.0.0.9:7000 reset, /secret/path"), code_pb2.UNAVAILABLE),
        (pb.Rejected(code=code_pb2.FAILED_PRECONDITION, message="/secret/path"), code_pb2.UNAVAILABLE),
        (pb.Rejected(code=code_pb2.UNAVAILABLE, message="/secret/path"), code_pb2.UNAVAILABLE),
        (pb.Rejected(code=code_pb2.INVALID_ARGUMENT, message="/secret/path"), code_pb2.INTERNAL),
        (ending(pb.END_REASON_FAILED, detail="/secret/path"), code_pb2.UNAVAILABLE),
        (ending(pb.END_REASON_CANCELLED), code_pb2.INTERNAL),
    ],
)
def test_a_failure_of_the_replica_has_its_code_and_tells_no_secrets(event: Any, code: int) -> None:
    answer, _ = make_answer()
    if isinstance(event, pb.Rejected):
        event.sequence_id = FIRST
    chunk = take(answer, token(0, 3), event)
    assert chunk is not None and chunk.text == "d" and not chunk.HasField("end")
    last = finished(answer)
    assert last.error.code == code
    assert "secret" not in last.error.message and "10.0.0.9" not in last.error.message
    assert last.usage.completion_tokens == 1
    assert not answer.choices[0].at_replica


def test_a_grammar_that_the_replica_cannot_follow_is_the_requests_fault() -> None:
    answer, _ = make_answer(grammar=pb.Grammar(regex="(a"))
    take(answer, refusal(grammar_problem="is unbalanced"))
    last = finished(answer)
    assert last.error.code == code_pb2.INVALID_ARGUMENT
    assert last.error.message.startswith("structured_output: ")
    assert "is unbalanced" in last.error.message and "(a" in last.error.message
    other, _ = make_answer(grammar=pb.Grammar(regex="a"))
    take(other, refusal(message="grammar: /secret/path"))
    assert finished(other).error.code == code_pb2.INTERNAL, "another field is not the client's doing, whatever it says"


def test_a_grammar_quoted_by_the_replica_reaches_neither_log_nor_status_in_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = "(secret\x1b[31m\n" * 100
    problem = f"cannot be used: '{source}': unclosed group"
    answer, _ = make_answer(grammar=pb.Grammar(regex=source))
    take(answer, refusal(message=f"grammar: {problem}", grammar_problem=problem))
    failed, _ = make_answer()
    take(failed, ending(pb.END_REASON_FAILED, detail=f"GrammarFailed: {source}"))
    said = finished(answer).error.message
    assert said.isprintable() and len(said) < 400 and "unclosed group" in said
    assert len(caplog.messages) == 2
    assert all(line.isprintable() and len(line) < 600 for line in caplog.messages)


def test_what_the_gateway_gives_up_ends_with_its_own_error() -> None:
    answer, _ = make_answer()
    take(answer, token(0, 3), DeadlineExceeded("too long"))
    assert finished(answer).error.code == code_pb2.DEADLINE_EXCEEDED
    assert answer.choices[0].at_replica, "leaving must cancel it there"


def test_logprobs_come_with_their_token() -> None:
    answer, _ = make_answer(logprobs=2)
    chunk = take(answer, token(0, 3, logprob=-0.5, top_ids=[3, 4], top_logprobs=[-0.5, -1.5]))
    assert chunk is not None
    top = [public.TokenLogprob(token_id=3, logprob=-0.5), public.TokenLogprob(token_id=4, logprob=-1.5)]
    assert list(chunk.tokens) == [public.Token(id=3, logprob=-0.5, top=top)]


# -- several choices ------------------------------------------------------------------------------------------


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
    assert answer.let_go() == [FIRST + 1], "its replica still computes what a stop string ended"
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


# -- echo -----------------------------------------------------------------------------------------------------


def judged(first_index: int, count: int, *, choice: int = 0, num_top: int = 1, **fields: Any) -> pb.SequenceOutput:
    run = pb.PromptLogprobs(
        first_index=first_index,
        logprobs=[-float(first_index + offset) for offset in range(count)],
        top_ids=[offset % 20 for offset in range(count * num_top)],
        top_logprobs=[-float(offset) for offset in range(count * num_top)],
    )
    return pb.SequenceOutput(sequence_id=FIRST + choice, prompt=run, **fields)


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


# -- all of it, in any order ----------------------------------------------------------------------------------


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
