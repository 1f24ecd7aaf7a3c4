"""Generate, end to end: check, admit, route, submit, stream, and leave nothing behind however it ends."""

import asyncio
import contextlib
import functools
import itertools
import logging
import secrets
import time
import uuid
from dataclasses import dataclass, replace

import grpc
from google.rpc import code_pb2

from orchestrator.gateway.answer.answer import Answer
from orchestrator.gateway.answer.choice import Choice
from orchestrator.gateway.answer.detokenizer import Detokenizer
from orchestrator.gateway.answer.echo import Echo
from orchestrator.gateway.answer.text import TextStream
from orchestrator.gateway.errors import ClientTooSlow, DeadlineExceeded, ReplicaFault
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.fleet.inbox import MAX_WAITING, Inbox
from orchestrator.gateway.fleet.journal import Journal
from orchestrator.gateway.fleet.leader import Leader
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.prompts import Prompts
from orchestrator.gateway.request.request import Request, check_model, check_request
from orchestrator.gateway.request.structured import check_structured
from orchestrator.gateway.request.structured_probe import GrammarProbe
from orchestrator.gateway.request.submission import entries, submit_message
from orchestrator.gateway.status import abort, code_of
from orchestrator.telemetry.requests import RequestRecord, Telemetry
from placement.errors import HeterodyneError, InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]

# How long a client may take to make room for what is left to say to it, once its request is over.
_LAST_WORD_S = 3.0


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
    """Serves Generate. Lives on one event loop; owns the journal.

    A request holds a slot of the admission for each of its choices: what is bounded is the work, and the memory for
    what clients have yet to read.
    """

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
        self._detokenizer = Detokenizer(model.tokenizer)
        self._grammars = GrammarProbe(model)
        self._prompts = Prompts(model)
        self.journal = Journal()

    async def generate(self, message: pb.GenerateRequest, context: Context) -> None:
        """Serve one request on ``context``. Before acceptance an error is a status; after it, a last message."""
        arrival = self._arrival(context)
        try:
            request = await self._check(message, arrival)
            async with contextlib.AsyncExitStack() as stack:
                slots = self._admission.slot(
                    priority=request.priority, timeout_s=arrival.remaining_s(), weight=request.num_choices
                )
                await stack.enter_async_context(slots)
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
        """Raises InvalidRequest, or NotAdmitted where too many long prompts, or grammars, wait for the same."""
        check_model(message.model, self._model)
        request = check_request(
            message,
            self._model,
            prompt_ids=await self._prompts.read(message, remaining_s=arrival.remaining_s),
            new_seed=lambda: secrets.randbits(63),
            new_id=lambda: uuid.uuid4().hex,
        )
        if request.num_choices > self._admission.max_in_flight:
            raise InvalidRequest(
                field="num_choices",
                value=request.num_choices,
                problem="is more than the service computes at once",
                fix=f"Ask for at most {self._admission.max_in_flight}.",
            )
        # Last, because it is the most work.
        grammar = await self._grammar(message.structured_output, arrival)
        return request if grammar is None else replace(request, grammar=grammar)

    async def _grammar(self, message: pb.StructuredOutput, arrival: _Arrival) -> worker_pb2.Grammar | None:
        grammar = check_structured(message, self._model)
        if grammar is not None:
            try:
                async with asyncio.timeout(arrival.remaining_s()):
                    await self._grammars.check(grammar)
            except TimeoutError:
                raise _overdue(arrival) from None
        return grammar

    async def close(self) -> None:
        """For when no request is served any more."""
        await self._grammars.close()

    async def _serve(self, request: Request, context: Context, arrival: _Arrival) -> Answer:
        """From acceptance to the terminal message. Raises ReplicaUnavailable before acceptance only."""
        leader, _route = self._fleet.route(len(request.prompt_ids))
        answer, inbox = self._open(request, leader), Inbox(limit=MAX_WAITING * request.num_choices)
        try:
            submitted_s = arrival.age_s()
            leader.submit(submit_message(request, [choice.entry for choice in answer.choices]), inbox)
            await self._talk(answer, leader, inbox, context, arrival, submitted_s)
        finally:
            for choice in answer.choices:
                leader.release(choice.entry.sequence_id, cancel=choice.at_replica)
                self.journal.close(choice.entry.sequence_id)
            self._telemetry.finished(self._record(request, answer, arrival))
        return answer

    def _open(self, request: Request, leader: Leader) -> Answer:
        """The answer that the leader will compute, its sequences in the journal."""
        choices = []
        sequences = entries(request, replica=leader.name, epoch=leader.epoch, sequence_ids=self._sequence_ids)
        for index, entry in enumerate(sequences):
            self.journal.open(entry)
            choices.append(
                Choice(
                    index=index,
                    entry=entry,
                    epoch=leader.epoch,
                    max_tokens=request.max_tokens,
                    journal=self.journal,
                    text=TextStream(self._detokenizer, request.stop, request.prompt_ids),
                )
            )
        text, judged = TextStream(self._detokenizer, (), ()), request.logprobs is not None
        echo = Echo(request.prompt_ids, text, judged=judged) if request.echo else None
        return Answer(request=request, choices=choices, echo=echo)

    async def _talk(
        self, answer: Answer, leader: Leader, inbox: Inbox, context: Context, arrival: _Arrival, submitted_s: float
    ) -> None:
        """Accepted, echo, chunks, Finished; all of it, writing included, within the request's time."""
        overdue = _overdue(arrival)
        # One timer and one limit for the whole of it: there may be thousands of tokens a second to pass on.
        timer = asyncio.get_running_loop().call_later(arrival.remaining_s(), inbox.put_now, overdue)
        try:
            async with asyncio.timeout(arrival.remaining_s() + _LAST_WORD_S) as limit:
                inbox.on_full = functools.partial(_cut, limit, answer)
                await context.write(pb.GenerateResponse(accepted=self._accepted(answer.request)))
                for response in answer.opening():
                    await context.write(response)
                while answer.outcome is None:
                    events = await inbox.take()
                    responses = answer.take(events, submitted_s=submitted_s, now_s=arrival.age_s())
                    for sequence_id in answer.let_go():
                        leader.release(sequence_id, cancel=True)
                    for response in responses:
                        await context.write(response)
                left_s = max(arrival.remaining_s(), _LAST_WORD_S)
                limit.reschedule(asyncio.get_running_loop().time() + left_s)
                await context.write(pb.GenerateResponse(finished=answer.finished(total_s=arrival.age_s())))
        except TimeoutError:
            # Nothing more can be written to it, the last message included; its slot is for somebody who listens.
            logger.info("client_deaf request_id=%s full=%s", answer.request.request_id, inbox.full)
            answer.outcome = ClientTooSlow("the answer was not read as fast as it came") if inbox.full else overdue
        finally:
            timer.cancel()
            inbox.silence()

    def _accepted(self, request: Request) -> pb.Accepted:
        return pb.Accepted(
            request_id=request.request_id,
            model=self._model.name,
            prompt_tokens=len(request.prompt_ids),
            seed=request.seed,
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
        times = answer.times()
        return RequestRecord(
            request_id=request.request_id,
            model=self._model.name,
            replica=answer.choices[0].entry.replica,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=answer.completion_tokens,
            arrived_ns=arrival.wall_ns,
            total_s=arrival.age_s(),
            queue_s=times.queue_s,
            first_token_s=times.first_token_s,
            per_token_s=times.per_token_s,
            outcome=name,
            failed=failed,
            parent=arrival.parent,
            num_choices=request.num_choices,
            cached_prompt_tokens=answer.choices[0].cached_tokens,
            max_tokens=request.max_tokens,
        )


def _cut(limit: asyncio.Timeout, answer: Answer) -> None:
    """Ends the wait for a client that does not read, unless it ends already."""
    if answer.outcome is None and not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())


def _overdue(arrival: _Arrival) -> DeadlineExceeded:
    return DeadlineExceeded(f"the request took longer than its {arrival.timeout_s:g} s")
