"""One answer: what a replica may say, in good and in bad order, and what the client gets to see of it."""

from typing import Any

import pytest
from google.rpc import code_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from orchestrator.gateway.answer import Answer
from orchestrator.gateway.journal import Journal, JournalEntry, Sampling
from orchestrator.gateway.leader import Lost
from orchestrator.gateway.request import Request
from orchestrator.gateway.status import code_of
from orchestrator.gateway.text import TextStream
from placement.errors import HeterodyneError
from protos.heterodyne.v1 import inference_pb2 as public
from protos.heterodyne.worker.v1 import worker_pb2 as pb

EPOCH = 3
SAMPLING = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=1)


def letters() -> Tokenizer:
    """Id i is the letter of that number."""
    vocabulary = {chr(ord("a") + i): i for i in range(26)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_answer(*, stop: tuple[str, ...] = (), epoch: int = EPOCH) -> tuple[Answer, Journal]:
    request = Request(
        request_id="r",
        prompt_ids=(1, 2),
        sampling=SAMPLING,
        max_tokens=10,
        stop=stop,
        stop_token_ids=(),
        logprobs=None,
        priority=0,
    )
    entry = JournalEntry(
        request_id="r",
        sequence_id=7,
        replica="replica-0",
        epoch=EPOCH,
        prompt_ids=(1, 2),
        sampling=SAMPLING,
        max_tokens=10,
        stop_token_ids=(),
        priority=0,
    )
    journal = Journal()
    journal.open(entry)
    text = TextStream(letters(), stop, (1, 2))
    return Answer(request=request, entry=entry, epoch=epoch, journal=journal, text=text), journal


def token(
    index: int, token_id: int, *, end: "pb.EndReason.ValueType | None" = None, **fields: Any
) -> pb.SequenceOutput:
    message = pb.SequenceOutput(sequence_id=7, index=index, token_id=token_id, **fields)
    if end is not None:
        message.end.reason = end
    return message


def take(answer: Answer, *events: Any, now_s: float = 1.0) -> public.Chunk | None:
    return answer.take(list(events), submitted_s=0.25, now_s=now_s)


def test_several_tokens_make_one_chunk_and_the_end_its_reason() -> None:
    answer, _ = make_answer()
    chunk = take(answer, token(0, 3, queue_s=0.5), token(1, 4))
    assert chunk is not None and (chunk.first_index, chunk.text) == (0, "de")
    chunk = take(answer, token(2, 5, end=pb.END_REASON_LENGTH), now_s=2.0)
    assert chunk is not None and (chunk.first_index, chunk.text) == (2, "f")
    finished = answer.finished()
    assert finished.finish_reason == public.FINISH_REASON_LENGTH
    assert finished.usage == public.Usage(prompt_tokens=2, completion_tokens=3)
    assert (finished.timings.queue_s, finished.timings.time_to_first_token_s) == (0.75, 1.0)
    assert finished.timings.time_per_output_token_s == 0.5
    assert not answer.at_replica


def test_after_a_stop_string_nothing_more_is_taken_and_the_replica_is_to_be_told() -> None:
    answer, _ = make_answer(stop=("ef",))
    chunk = take(answer, token(0, 3), token(1, 4), token(2, 5), token(3, 6))
    assert chunk is not None and chunk.text == "d"
    assert [item.id for item in chunk.tokens] == [3, 4, 5]
    assert answer.at_replica, "leaving must cancel it there"
    finished = answer.finished()
    assert (finished.finish_reason, finished.matched_stop) == (public.FINISH_REASON_STOP, "ef")
    assert finished.usage.completion_tokens == 3


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
        (pb.SequenceOutput(end=pb.End(reason=pb.END_REASON_FAILED, detail="/secret/path")), code_pb2.UNAVAILABLE),
        (pb.SequenceOutput(end=pb.End(reason=pb.END_REASON_CANCELLED)), code_pb2.INTERNAL),
    ],
)
def test_a_failure_of_the_replica_has_its_code_and_tells_no_secrets(event: Any, code: int) -> None:
    answer, _ = make_answer()
    take(answer, token(0, 3), event)
    finished = answer.finished()
    assert finished.error.code == code
    assert "secret" not in finished.error.message and "10.0.0.9" not in finished.error.message
    assert finished.usage.completion_tokens == 1
    assert not answer.at_replica
