"""Generate, end to end: admit, route, submit, stream, and leave nothing behind however it ends."""

import asyncio
import functools
import itertools
import logging

from google.rpc import code_pb2

from orchestrator.gateway.answer.answer import Answer
from orchestrator.gateway.answer.choice import Choice
from orchestrator.gateway.answer.detokenizer import Detokenizer
from orchestrator.gateway.answer.echo import Echo
from orchestrator.gateway.answer.text import TextStream
from orchestrator.gateway.client import Accepted, Client, FinishReason, Outcome
from orchestrator.gateway.errors import ClientTooSlow
from orchestrator.gateway.fleet.admission import Admission
from orchestrator.gateway.fleet.fleet import Bound, Fleet
from orchestrator.gateway.fleet.inbox import MAX_WAITING, Inbox
from orchestrator.gateway.fleet.journal import Journal
from orchestrator.gateway.fleet.leader import Leader
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.request import Request
from orchestrator.gateway.request.submission import entries, submit_message
from orchestrator.gateway.status import code_of
from orchestrator.telemetry.requests import RequestRecord, Telemetry
from placement.serving.routing.choice import Route
from placement.serving.routing.router import Prompt
from protos.codec.log_record import said

logger = logging.getLogger(__name__)

# How long a client may take to make room for what is left to say to it, once its request is over.
_LAST_WORD_S = 3.0


class Generator:
    """Serves checked requests. Lives on one event loop; owns the journal.

    A request holds a slot of the admission for each of its choices: what is bounded is the work, and the memory for
    what clients have yet to read.
    """

    def __init__(self, *, model: ServedModel, fleet: Fleet, admission: Admission, telemetry: Telemetry) -> None:
        self._model = model
        self._fleet = fleet
        self._admission = admission
        self._telemetry = telemetry
        self._sequence_ids = itertools.count(1)
        self._detokenizer = Detokenizer(model.tokenizer)
        self.journal = Journal()

    async def generate(self, request: Request, client: Client) -> Outcome:
        """Serves one request, from its place in the queue to its last event; returns how it ended.

        When this returns, the request's slots are free again: a client that sees the end can send the next request.

        Raises:
            NotAdmitted: the service is at its limit, or about to stop, or no replica had room in time. Nothing was
                sent.
            ReplicaUnavailable: no replica is ready. Nothing was sent.
        """
        slots = self._admission.slot(
            priority=request.priority, timeout_s=client.remaining_s(), weight=request.num_choices
        )
        async with slots:
            answer = await self._serve(request, client)
        assert answer.outcome is not None
        return answer.outcome

    async def _serve(self, request: Request, client: Client) -> Answer:
        """Routes and submits the request and talks to its client. Raises ReplicaUnavailable before acceptance only."""
        bound = await self._fleet.route(_prompt(request), priority=request.priority, timeout_s=client.remaining_s())
        # Nothing may be awaited before the request is submitted: the room is its own for this turn of the loop.
        leader, route = bound.leader, bound.route
        extra = said(
            "routed", request_id=request.request_id, replica=route.replica, reason=route.reason, prefill=route.prefill
        )
        logger.debug("Request %s goes to %s: %s.", request.request_id, route.replica, route.reason, extra=extra)
        answer, inbox = self._open(request, bound), Inbox(limit=MAX_WAITING * request.num_choices)
        submitted_s = client.age_s()
        try:
            bound.submit(submit_message(request, [choice.entry for choice in answer.choices]), inbox)
            await self._talk(answer, leader, inbox, client, submitted_s)
        finally:
            for choice in answer.choices:
                leader.release(choice.entry.sequence_id, cancel=choice.at_replica)
                self.journal.close(choice.entry.sequence_id)
            self._telemetry.finished(self._record(request, answer, client, route, submitted_s))
        return answer

    def _open(self, request: Request, bound: Bound) -> Answer:
        """Returns the answer that the replicas will compute, its sequences in the journal."""
        choices, leader = [], bound.leader
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
                    text=TextStream(self._detokenizer, request.stop, request.prompt_ids, request.shown_tokens),
                    grammar=request.grammar,
                )
            )
        text, judged = TextStream(self._detokenizer, (), ()), request.logprobs is not None
        echo = Echo(request.prompt_ids, text, judged=judged) if request.echo else None
        return Answer(request=request, choices=choices, echo=echo, prefill_replica=bound.route.prefill)

    async def _talk(self, answer: Answer, leader: Leader, inbox: Inbox, client: Client, submitted_s: float) -> None:
        """Sends every event, from Accepted to Finished, within the request's time; sending takes of it too."""
        overdue = client.overdue()
        # One timer and one limit for the whole of it: there may be thousands of tokens a second to pass on.
        timer = asyncio.get_running_loop().call_later(client.remaining_s(), inbox.put_now, overdue)
        try:
            async with asyncio.timeout(client.remaining_s() + _LAST_WORD_S) as limit:
                inbox.on_full = functools.partial(_cut, limit, answer)
                await client.send(self._accepted(answer.request))
                for echoed in answer.opening():
                    await client.send(echoed)
                while answer.outcome is None:
                    message = await inbox.take()
                    events = answer.take(message, submitted_s=submitted_s, now_s=client.age_s())
                    for sequence_id in answer.take_released():
                        leader.release(sequence_id, cancel=True)
                    for event in events:
                        await client.send(event)
                left_s = max(client.remaining_s(), _LAST_WORD_S)
                limit.reschedule(asyncio.get_running_loop().time() + left_s)
                await client.send(answer.finished(total_s=client.age_s()))
        except TimeoutError:
            # Nothing more can be sent to it, the last event included; its slot is for somebody who listens.
            request_id = answer.request.request_id
            words = "A client no longer reads its answer (request %s)."
            logger.info(words, request_id, extra=said("client_deaf", request_id=request_id, full=inbox.full))
            answer.outcome = ClientTooSlow("the answer was not read as fast as it came") if inbox.full else overdue
        finally:
            timer.cancel()
            inbox.silence()

    def _accepted(self, request: Request) -> Accepted:
        return Accepted(
            request_id=request.request_id,
            model=self._model.name,
            prompt_tokens=len(request.prompt_ids),
            seed=request.seed,
        )

    def _record(self, request: Request, answer: Answer, client: Client, route: Route, bound_s: float) -> RequestRecord:
        times = answer.times()
        return RequestRecord(
            request_id=request.request_id,
            model=self._model.name,
            replica=answer.choices[0].entry.replica,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=answer.completion_tokens,
            arrived_ns=client.arrived_ns,
            total_s=client.age_s(),
            queue_s=times.queue_s,
            first_token_s=times.first_token_s,
            per_token_s=times.per_token_s,
            outcome=_label(answer.outcome, client),
            failed=not isinstance(answer.outcome, FinishReason),
            parent=client.trace,
            num_choices=request.num_choices,
            cached_prompt_tokens=answer.choices[0].cached_tokens,
            max_tokens=request.max_tokens,
            route_reason=route.reason,
            bound_s=bound_s,
            route_prefill=route.prefill,
            transfer=answer.transfer,
        )


def _prompt(request: Request) -> Prompt:
    """Returns the prompt as routing sees it. One whose tokens are scored is computed whole."""
    is_scored = request.echo and request.logprobs is not None
    return Prompt(
        token_ids=request.prompt_ids,
        cache_salt=request.cache_salt,
        reuses_prefix=not is_scored,
        num_sequences=request.num_choices,
        max_tokens=request.max_tokens,
    )


def _label(outcome: Outcome | None, client: Client) -> str:
    """Returns how a request ended, as telemetry counts it. None means that the client went before the end."""
    if isinstance(outcome, FinishReason):
        return outcome.value
    if outcome is None:
        # It went by its own deadline or by its own will.
        code = code_pb2.CANCELLED if client.remaining_s() else code_pb2.DEADLINE_EXCEEDED
    else:
        code = code_of(outcome)
    return str(code_pb2.Code.Name(code))


def _cut(limit: asyncio.Timeout, answer: Answer) -> None:
    """Ends the wait for a client that does not read, unless it ends already."""
    if answer.outcome is None and not limit.expired():
        limit.reschedule(asyncio.get_running_loop().time())
