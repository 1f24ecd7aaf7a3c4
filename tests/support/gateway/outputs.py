"""An answer, what a replica says of it, and what the client sees, as the public service writes it."""

import itertools
from typing import Any

from google.rpc import code_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from orchestrator.gateway.answer.answer import Answer
from orchestrator.gateway.answer.choice import Choice
from orchestrator.gateway.answer.detokenizer import Detokenizer
from orchestrator.gateway.answer.echo import Echo
from orchestrator.gateway.answer.text import TextStream
from orchestrator.gateway.fleet.journal import Journal
from orchestrator.gateway.grpc_client import response_of
from orchestrator.gateway.request.request import Request
from orchestrator.gateway.request.submission import entries
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
    prefill_replica: str | None = None,
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
        choices.append(
            Choice(
                index=index,
                entry=entry,
                epoch=epoch,
                max_tokens=max_tokens,
                journal=journal,
                text=text,
                grammar=grammar,
            )
        )
    shown = Echo(prompt_ids, TextStream(Detokenizer(letters()), (), ()), judged=logprobs is not None) if echo else None
    return Answer(request=request, choices=choices, echo=shown, prefill_replica=prefill_replica), journal


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


def judged(first_index: int, count: int, *, choice: int = 0, num_top: int = 1, **fields: Any) -> pb.SequenceOutput:
    run = pb.PromptLogprobs(
        first_index=first_index,
        logprobs=[-float(first_index + offset) for offset in range(count)],
        top_ids=[offset % 20 for offset in range(count * num_top)],
        top_logprobs=[-float(offset) for offset in range(count * num_top)],
    )
    return pb.SequenceOutput(sequence_id=FIRST + choice, prompt=run, **fields)
