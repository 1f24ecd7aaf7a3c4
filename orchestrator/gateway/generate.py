"""Generate, end to end: check, admit, route, submit, stream, and leave nothing behind however it ends."""

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
import uuid
from dataclasses import dataclass

import grpc
from google.rpc import code_pb2

from orchestrator.gateway.admission import Admission
from orchestrator.gateway.answer import Answer
from orchestrator.gateway.fleet import Fleet
from orchestrator.gateway.journal import Journal, JournalEntry
from orchestrator.gateway.leader import Inbox, SequenceEvent
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request import Request, check_length, check_model, check_request, check_text
from orchestrator.gateway.status import DeadlineExceeded, ReplicaFault, abort, code_of
from orchestrator.gateway.text import TextStream
from orchestrator.telemetry import RequestRecord, Telemetry
from placement.errors import HeterodyneError
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]

# Longer texts are tokenized in a thread, so that health checks and other streams do not wait for them.
_INLINE_CHARACTERS = 4096
_TOKENIZING, _TOKENIZING_QUEUE = 2, 64
_LAST_WORD_S = 5.0
_LEAST_WRITE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrival:
    """When a request came, and until when it may take (monotonic s)."""

    monotonic_s: float
    wall_ns: int
    timeout_s: float
    parent: dict[str, str]

    def age_s(self) -> float:
        return time.monotonic() - self.monotonic_s

    def remaining_s(self) -> float:
        return max(0.0, self.timeout_s - self.age_s())


class Generator:
    """Serves Generate. Lives on one event loop; owns the journal."""

    def __init__(
        self,
        *,
        model: ServedModel,
        fleet: Fleet,
        admission: Admission,
        telemetry: Telemetry,
        request_timeout_s: float,
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._admission = admission
        self._telemetry = telemetry
        self._request_timeout_s = request_timeout_s
        self._sequence_ids = itertools.count(1)
        self._tokenizing = Admission(_TOKENIZING, _TOKENIZING_QUEUE)
        self.journal = Journal()

    async def generate(self, message: pb.GenerateRequest, context: Context) -> None:
        """Serve one request on ``context``. Before acceptance an error is a status; after it, a last message."""
        arrival = self._arrival(context)
        try:
            request = await self._check(message, arrival)
            async with contextlib.AsyncExitStack() as stack:
                slot = self._admission.slot(priority=request.priority, timeout_s=arrival.remaining_s())
                await stack.enter_async_context(slot)
                answer = await self._serve(request, context, arrival)
        except HeterodyneError as error:
            self._telemetry.refused(code_pb2.Code.Name(code_of(error)))
            await abort(context, error)
        except Exception:
            # What gRPC would tell the client by itself may hold anything; this holds nothing.
            logger.exception("request_failed")
            await abort(context, ReplicaFault("the service failed; its log says how"))
        # The slot is free again before the last status leaves: who sees the end can send the next.
        if isinstance(answer.outcome, HeterodyneError):
            await abort(context, answer.outcome)

    def _arrival(self, context: Context) -> _Arrival:
        client_s = context.time_remaining()
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        return _Arrival(
            monotonic_s=time.monotonic(),
            wall_ns=time.time_ns(),
            timeout_s=min(self._request_timeout_s, client_s if client_s is not None else self._request_timeout_s),
            parent={key: metadata[key] for key in ("traceparent", "tracestate") if key in metadata},
        )

    async def _check(self, message: pb.GenerateRequest, arrival: _Arrival) -> Request:
        """Raises InvalidRequest."""
        check_model(message.model, self._model)
        if message.WhichOneof("input") == "prompt":
            timeout_s = arrival.remaining_s()
            prompt_ids = await self.tokenize(message.prompt, field="prompt", special=True, timeout_s=timeout_s)
        else:
            check_length(len(message.prompt_ids.ids), self._model)
            prompt_ids = list(message.prompt_ids.ids)
        return check_request(
            message,
            self._model,
            prompt_ids=prompt_ids,
            new_seed=lambda: secrets.randbits(63),
            new_id=lambda: uuid.uuid4().hex,
        )

    async def tokenize(self, text: str, *, field: str, special: bool, timeout_s: float) -> list[int]:
        """The token ids of ``text``.

        Raises:
            InvalidRequest: it cannot fit the context.
            NotAdmitted: too many long texts wait for the same, or their turn does not come in time.
        """
        check_text(text, self._model, field=field)
        if len(text) <= _INLINE_CHARACTERS:
            return list(self._model.tokenizer.encode(text, add_special_tokens=special).ids)
        async with self._tokenizing.slot(timeout_s=timeout_s):
            # A batch of one: unlike `encode` it lets go of the interpreter's lock, so the loop goes on meanwhile.
            encode = self._model.tokenizer.encode_batch
            (encoding,) = await asyncio.to_thread(encode, [text], add_special_tokens=special)
        return list(encoding.ids)

    async def _serve(self, request: Request, context: Context, arrival: _Arrival) -> Answer:
        """From acceptance to the terminal message. Raises ReplicaUnavailable before acceptance only."""
        leader, _route = self._fleet.route(len(request.prompt_ids))
        entry = JournalEntry(
            request_id=request.request_id,
            sequence_id=next(self._sequence_ids),
            replica=leader.name,
            epoch=leader.epoch,
            prompt_ids=request.prompt_ids,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop_token_ids=request.stop_token_ids,
            priority=request.priority,
        )
        text = TextStream(self._model.tokenizer, request.stop, request.prompt_ids)
        answer = Answer(request=request, entry=entry, epoch=leader.epoch, journal=self.journal, text=text)
        self.journal.open(entry)
        submitted_s = arrival.age_s()
        inbox = leader.submit(_submit(request, entry))
        try:
            await self._talk(answer, inbox, context, arrival, submitted_s)
        finally:
            leader.release(entry.sequence_id, cancel=answer.at_replica)
            self.journal.close(entry.sequence_id)
            self._telemetry.finished(self._record(request, answer, arrival))
        return answer

    async def _talk(
        self, answer: Answer, inbox: Inbox, context: Context, arrival: _Arrival, submitted_s: float
    ) -> None:
        """Accepted, chunks, Finished; all of it, writing included, within the request's time."""
        overdue = DeadlineExceeded(f"the request took longer than its {arrival.timeout_s:g} s")
        try:
            await _write(context, pb.GenerateResponse(accepted=self._accepted(answer.request)), arrival.remaining_s())
            while answer.outcome is None:
                try:
                    async with asyncio.timeout(arrival.remaining_s()):
                        events = await _next(inbox)
                except TimeoutError:
                    answer.fail(overdue)
                    break
                chunk = answer.take(events, submitted_s=submitted_s, now_s=arrival.age_s())
                if chunk is not None:
                    await _write(context, pb.GenerateResponse(chunk=chunk), arrival.remaining_s())
            answer.clock.total_s = arrival.age_s()
            await _write(context, pb.GenerateResponse(finished=answer.finished()), _LAST_WORD_S)
        except _ClientDeaf:
            # Nothing more can be written to it, the last message included; its slot is for somebody who listens.
            logger.info("client_deaf request_id=%s", answer.request.request_id)
            answer.outcome = overdue

    def _accepted(self, request: Request) -> pb.Accepted:
        return pb.Accepted(
            request_id=request.request_id,
            model=self._model.name,
            prompt_tokens=len(request.prompt_ids),
            seed=request.sampling.seed,
        )

    def _record(self, request: Request, answer: Answer, arrival: _Arrival) -> RequestRecord:
        outcome = answer.outcome
        if outcome is None:
            # The client went, by its own deadline or by its own will.
            name, failed = "CANCELLED" if arrival.remaining_s() else "DEADLINE_EXCEEDED", True
        elif isinstance(outcome, HeterodyneError):
            name, failed = code_pb2.Code.Name(code_of(outcome)), True
        else:
            name, failed = pb.FinishReason.Name(outcome).removeprefix("FINISH_REASON_").lower(), False
        clock = answer.clock
        return RequestRecord(
            request_id=request.request_id,
            model=self._model.name,
            replica=answer.entry.replica,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(answer.entry.emitted_ids),
            arrived_ns=arrival.wall_ns,
            total_s=arrival.age_s(),
            queue_s=clock.queue_s,
            first_token_s=clock.first_token_s,
            per_token_s=clock.per_token_s(len(answer.entry.emitted_ids)),
            outcome=name,
            failed=failed,
            parent=arrival.parent,
        )


class _ClientDeaf(Exception):
    """The client keeps its connection and reads nothing."""


async def _write(context: Context, message: pb.GenerateResponse, timeout_s: float) -> None:
    """Send a message. A write that was given up cannot be followed by another.

    Raises:
        _ClientDeaf: the client has not made room for it, for at least a second and until ``timeout_s``.
    """
    writing = asyncio.ensure_future(context.write(message))
    try:
        done, _ = await asyncio.wait({writing}, timeout=max(timeout_s, _LEAST_WRITE_S))
        if not done:
            raise _ClientDeaf
        writing.result()
    finally:
        writing.cancel()


async def _next(inbox: Inbox) -> list[SequenceEvent]:
    """All events that are there, at least one: a slow client gets few large chunks."""
    events = [await inbox.get()]
    while not inbox.empty():
        events.append(inbox.get_nowait())
    return events


def _submit(request: Request, entry: JournalEntry) -> worker_pb2.Submit:
    return worker_pb2.Submit(
        sequence_id=entry.sequence_id,
        prompt_ids=request.prompt_ids,
        sampling=worker_pb2.Sampling(
            temperature=request.sampling.temperature,
            top_k=request.sampling.top_k,
            top_p=request.sampling.top_p,
            seed=request.sampling.seed,
        ),
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_token_ids,
        priority=request.priority,
        logprobs=request.logprobs,
    )
