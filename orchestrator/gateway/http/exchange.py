"""Serves one request for an answer: its body becomes checked requests, and the generator's events its response."""

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from google.rpc import code_pb2
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.gateway.client import Client, Event
from orchestrator.gateway.errors import ReplicaFault
from orchestrator.gateway.generate import Generator
from orchestrator.gateway.http.answering.parts import Answering
from orchestrator.gateway.http.asking.names import renamed
from orchestrator.gateway.http.connection import Connection, Gone
from orchestrator.gateway.http.problem import HttpError
from orchestrator.gateway.model import ServedModel
from orchestrator.gateway.request.reader import RequestReader
from orchestrator.gateway.request.request import MAX_REQUEST_ID, Request
from orchestrator.gateway.status import code_of
from orchestrator.telemetry.requests import Telemetry
from placement.errors import FieldError, HeterodyneError
from protos.codec.log_record import said
from protos.heterodyne.v1 import inference_pb2 as pb

logger = logging.getLogger(__name__)

_TRACE_HEADERS = ("traceparent", "tracestate")
_REQUEST_ID = "x-request-id"
_INLINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the HTTP API serves with, all of it the gateway's own.

    Attributes:
        is_serving: says whether a request would be taken now.
    """

    model: ServedModel
    requests: RequestReader
    generator: Generator
    telemetry: Telemetry
    request_timeout_s: float
    is_serving: Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a body asks for.

    Attributes:
        messages: a request for each prompt.
        names: what the fields of those are called in the body.
        shown_tokens: the special tokens that the answer's text does not leave out, with their texts.
    """

    messages: tuple[pb.GenerateRequest, ...]
    answering: Answering
    names: Mapping[str, str]
    shown_tokens: Mapping[int, str] = field(default_factory=dict)


Ask = Callable[[bytes, str], Asked]
"""Reads a body; the other argument is the request's id. Raises InvalidRequest."""


class Exchange(Response):
    """The response to a request for an answer. Once the client goes nothing is computed for it any more."""

    def __init__(self, service: Service, ask: Ask) -> None:
        super().__init__()
        self._service = service
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the request, from its body to its last byte."""
        request_id = request_id_of(scope)
        timeout_s = self._service.request_timeout_s
        connection = Connection(scope, receive, send, request_id=request_id, timeout_s=timeout_s)
        client = self._client(connection, request_id)
        try:
            data = await connection.read_json(client.remaining_s())
        except Gone:
            return
        except HttpError as error:
            await connection.send_problem(error)
            return
        await connection.run(self._serve(connection, client, data, request_id))

    def _client(self, connection: Connection, request_id: str) -> Client:
        async def send_nothing(event: Event) -> None:
            raise AssertionError(f"{request_id} has no prompt yet")

        headers = connection.headers
        return Client(
            timeout_s=self._service.request_timeout_s,
            trace={name: headers[name] for name in _TRACE_HEADERS if name in headers},
            send=send_nothing,
        )

    async def _serve(self, connection: Connection, client: Client, data: bytes, request_id: str) -> None:
        """Sends the answer, or the error that took its place."""
        try:
            asked = await self._read(data, request_id)
            try:
                requests = [
                    replace(await self._service.requests.read(message, client), shown_tokens=asked.shown_tokens)
                    for message in asked.messages
                ]
                await self._answer(connection, client, asked, requests)
            except FieldError as error:
                raise renamed(error, asked.names) from None
        except _Ended as ended:
            await connection.send_problem(ended.error)
        except HeterodyneError as error:
            self._service.telemetry.refused(code_pb2.Code.Name(code_of(error)))
            await connection.send_problem(error)
        except Exception:
            # What a library says may hold anything; this holds nothing.
            logger.exception("A request failed in a way that nobody foresaw.", extra=said("request_failed"))
            await connection.send_problem(ReplicaFault("the service failed; its log says how"))

    async def _read(self, data: bytes, request_id: str) -> Asked:
        """Returns what the body asks for. A long one is read in a thread, so that the event loop goes on meanwhile."""
        if len(data) <= _INLINE_BYTES:
            return self._ask(data, request_id)
        return await asyncio.to_thread(self._ask, data, request_id)

    async def _answer(self, connection: Connection, client: Client, asked: Asked, requests: Sequence[Request]) -> None:
        """Has all prompts answered, at the same time, and sends the end of it. Raises the first error."""
        answering = asked.answering

        async def answer(prompt: int) -> None:
            async def send(event: Event) -> None:
                await connection.stream(answering.take(prompt, event))

            outcome = await self._service.generator.generate(requests[prompt], replace(client, send=send))
            if isinstance(outcome, FieldError):
                raise _Ended(renamed(outcome, asked.names))
            if isinstance(outcome, HeterodyneError):
                raise _Ended(outcome)

        await _all_of(answer, len(requests))
        if answering.is_stream:
            await connection.end_stream(answering.end())
        else:
            (whole,) = answering.end()
            await connection.send_json(whole)


class _Ended(Exception):
    """An answer that was accepted ended in an error, which telemetry has counted."""

    def __init__(self, error: HeterodyneError) -> None:
        self.error = error


async def _all_of(answer: Callable[[int], Coroutine[Any, Any, None]], count: int) -> None:
    """Awaits the answers to all prompts. The first that fails ends the others, and is raised."""
    if count == 1:
        await answer(0)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for prompt in range(count):
                group.create_task(answer(prompt))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


def request_id_of(scope: Scope) -> str:
    """Returns what the client calls its request in the header X-Request-Id, or else a new name."""
    for name, value in scope["headers"]:
        if name == _REQUEST_ID.encode():
            given = str(value, "latin-1")
            if given.isascii() and given.isprintable() and 0 < len(given) <= MAX_REQUEST_ID // 2:
                return given
    return uuid.uuid4().hex
