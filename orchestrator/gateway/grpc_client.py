"""The client of a gRPC call: its deadline, its trace headers, and its events as messages of the public service."""

from collections.abc import Mapping, Sequence

import grpc
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from orchestrator.gateway.client import (
    Accepted,
    ChoiceEnd,
    Client,
    Delta,
    Echoed,
    Event,
    Finished,
    FinishReason,
    TokenScore,
)
from orchestrator.gateway.status import code_of
from orchestrator.telemetry.transfers import KvTransfer
from placement.errors import HeterodyneError
from protos.heterodyne.v1 import inference_pb2 as pb

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]

_TRACE_HEADERS = ("traceparent", "tracestate")
_REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


def grpc_client(context: Context, *, max_timeout_s: float) -> Client:
    """Returns the client of a call that has just arrived. It may take ``max_timeout_s``, or less where it says so."""
    timeout_s = context.time_remaining()
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}

    async def send(event: Event) -> None:
        await context.write(response_of(event))

    return Client(
        timeout_s=max_timeout_s if timeout_s is None else min(max_timeout_s, timeout_s),
        has_deadline=timeout_s is not None and timeout_s < max_timeout_s,
        trace={key: metadata[key] for key in _TRACE_HEADERS if key in metadata},
        send=send,
    )


def response_of(event: Event) -> pb.GenerateResponse:
    """Returns an event as the public service streams it."""
    match event:
        case Delta():
            return _chunk(event)
        case Accepted():
            accepted = pb.Accepted(
                request_id=event.request_id, model=event.model, prompt_tokens=event.prompt_tokens, seed=event.seed
            )
            return pb.GenerateResponse(accepted=accepted)
        case Echoed():
            return _echo(event)
        case Finished():
            return pb.GenerateResponse(finished=_finished(event))


def _chunk(event: Delta) -> pb.GenerateResponse:
    """Writes into the response in place: this is done for every token of every stream."""
    response = pb.GenerateResponse()
    chunk = response.chunk
    chunk.choice, chunk.first_index, chunk.text = event.choice, event.first_index, event.text
    _add_tokens(chunk.tokens, event.token_ids, event.scores)
    if event.end is not None:
        chunk.end.CopyFrom(_end(event.end))
    return response


def _echo(event: Echoed) -> pb.GenerateResponse:
    response = pb.GenerateResponse()
    echo = response.echo
    echo.first_index, echo.text = event.first_index, event.text
    _add_tokens(echo.tokens, event.token_ids, event.scores)
    return response


def _add_tokens(
    tokens: RepeatedCompositeFieldContainer[pb.Token], token_ids: Sequence[int], scores: Mapping[int, TokenScore]
) -> None:
    for position, token_id in enumerate(token_ids):
        token = tokens.add(id=token_id)
        score = scores.get(position)
        if score is not None:
            token.logprob = score.logprob
            for top_id, logprob in score.top:
                token.top.add(token_id=top_id, logprob=logprob)


def _end(end: ChoiceEnd) -> pb.ChoiceEnd:
    return pb.ChoiceEnd(
        finish_reason=_REASONS[end.finish_reason],
        matched_stop=end.matched_stop,
        completion_tokens=end.completion_tokens,
    )


def _finished(event: Finished) -> pb.Finished:
    message = pb.Finished(
        usage=pb.Usage(
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            cached_prompt_tokens=event.cached_prompt_tokens,
        ),
        timings=pb.Timings(
            queue_s=event.times.queue_s,
            time_to_first_token_s=event.times.first_token_s,
            time_per_output_token_s=event.times.per_token_s,
            total_s=event.total_s,
        ),
        matched_stop=event.matched_stop,
        replica=event.replica,
    )
    if event.transfer is not None:
        _add_transfer(message, event.transfer)
    if isinstance(event.outcome, HeterodyneError):
        message.error.CopyFrom(pb.Error(code=code_of(event.outcome), message=str(event.outcome)))
    else:
        message.finish_reason = _REASONS[event.outcome]
    return message


def _add_transfer(message: pb.Finished, transfer: KvTransfer) -> None:
    """Adds what a client may know of a transfer: a problem may name addresses."""
    if not transfer.problem:
        message.prefill_replica = transfer.prefill
    message.transfer.CopyFrom(
        pb.KvTransfer(
            num_tokens=transfer.num_tokens,
            num_bytes=transfer.num_bytes,
            prefill_s=transfer.prefill_s,
            exposed_s=transfer.exposed_s,
        )
    )
