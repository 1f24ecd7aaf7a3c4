"""One answer of one choice: what a replica may say, in good and in bad order, and what the client gets to see of it."""

from typing import Any

import pytest
from google.rpc import code_pb2

from orchestrator.gateway.errors import DeadlineExceeded
from orchestrator.gateway.fleet.inbox import Loss, Lost
from orchestrator.gateway.status import code_of
from placement.errors import HeterodyneError
from placement.serving.grammar import ENDS_TOO_SOON
from protos.heterodyne.v1 import inference_pb2 as public
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.gateway.outputs import EPOCH, FIRST, ending, finished, make_answer, refusal, take, take_all, token

WORKER_LOST = "replica-0: one of its workers was lost; the request may be sent again"


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
    assert not answer.choices[0].at_replica and answer.take_released() == []


def test_after_a_stop_string_nothing_more_is_taken_and_the_replica_is_to_be_told() -> None:
    answer, _ = make_answer(stop=("ef",))
    chunk = take(answer, token(0, 3), token(1, 4), token(2, 5), token(3, 6))
    assert chunk is not None and chunk.text == "d"
    assert [item.id for item in chunk.tokens] == [3, 4, 5]
    assert (chunk.end.matched_stop, chunk.end.completion_tokens) == ("ef", 3)
    assert answer.take_released() == [FIRST], "it must be cancelled there"
    assert answer.take_released() == [], "once"
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


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("grammar", [pb.Grammar(regex="(a)"), pb.Grammar(lark="(a)"), pb.Grammar(json_schema="(a)")])
def test_a_grammar_that_outgrows_its_limits_midway_is_the_requests_fault(grammar: pb.Grammar, num_choices: int) -> None:
    answer, _ = make_answer(grammar=grammar, num_choices=num_choices)
    take(answer, token(0, 3))
    problem = "the answer cannot follow its grammar: lexer error: too many expressions constructed"
    end = pb.End(reason=pb.END_REASON_FAILED, detail="/secret/path", grammar_problem=problem)
    take(answer, pb.SequenceOutput(sequence_id=FIRST, end=end))
    last = finished(answer)
    assert last.error.code == code_pb2.INVALID_ARGUMENT
    assert last.error.message.startswith(f"structured_output: cannot be followed: after 1 tokens, {problem}")
    assert "(a)" in last.error.message and "secret" not in last.error.message and "replica" not in last.error.message
    assert [choice.at_replica for choice in answer.choices] == [False] + [True] * (num_choices - 1)


def test_a_grammar_that_ends_before_min_tokens_is_mended_by_fewer_of_them() -> None:
    answer, _ = make_answer(grammar=pb.Grammar(regex="ab"))
    end = pb.End(reason=pb.END_REASON_FAILED, grammar_problem=ENDS_TOO_SOON)
    take(answer, token(0, 3), pb.SequenceOutput(sequence_id=FIRST, end=end))
    message = finished(answer).error.message
    assert "after 1 tokens, the grammar ends the answer before it has min_tokens" in message
    assert "Lower min_tokens" in message and "repetitions" not in message


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


def test_a_client_reads_the_same_where_the_replica_itself_says_that_a_worker_was_lost() -> None:
    answer, _ = make_answer()
    take(answer, token(0, 3), ending(pb.END_REASON_FAILED, detail="PeerFailed: /secret/path"))
    error = finished(answer).error
    assert (error.code, error.message) == (code_pb2.UNAVAILABLE, WORKER_LOST)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Loss.STOPPED, "the service was stopped before the answer was complete"),
        (Loss.RANK_FAILED, WORKER_LOST),
    ],
)
def test_a_client_reads_whether_the_service_was_stopped_or_a_replica_was_lost(kind: Loss, words: str) -> None:
    answer, _ = make_answer()
    take(answer, Lost(cause="/secret/path", kind=kind))
    error = finished(answer).error
    assert (error.code, error.message) == (code_pb2.UNAVAILABLE, words)


def test_a_prompt_that_another_replica_computed_is_told_of_and_its_prefill_ends_the_queue() -> None:
    answer, _ = make_answer(prefill_replica="replica-1", num_choices=2, max_tokens=1)
    transfer = pb.KvTransfer(num_tokens=3, num_bytes=96, queue_s=9.0, prefill_s=0.4, exposed_s=0.1, by_layer=True)
    take_all(
        answer,
        token(0, 1, end=pb.END_REASON_LENGTH, transfer=transfer, queue_s=0.7),
        token(0, 2, end=pb.END_REASON_LENGTH, choice=1),
        now_s=1.0,
    )
    last = finished(answer)
    assert last.prefill_replica == "replica-1" and last.replica == "replica-0"
    assert last.transfer == public.KvTransfer(num_tokens=3, num_bytes=96, prefill_s=0.4, exposed_s=0.1)
    assert last.timings.queue_s == pytest.approx(0.5), "until the prefill began, by the durations that it told"
    assert answer.transfer is not None and answer.transfer.by_layer


def test_a_prompt_whose_keys_and_values_did_not_come_was_computed_here_and_the_problem_is_not_told() -> None:
    answer, _ = make_answer(prefill_replica="replica-1", max_tokens=1)
    failed = pb.KvTransfer(problem="10.0.0.7:41000 was lost")
    take_all(answer, token(0, 1, end=pb.END_REASON_LENGTH, transfer=failed, queue_s=0.5))
    last = finished(answer)
    assert not last.HasField("prefill_replica") and last.transfer == public.KvTransfer()
    assert last.timings.queue_s == 0.75
    assert answer.transfer is not None and answer.transfer.problem == failed.problem
