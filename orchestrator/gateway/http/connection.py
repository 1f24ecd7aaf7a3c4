"""Owns the connection of one HTTP request: its body within bounds, its response, and whether its client is there."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from orchestrator.gateway.http.asking.body import MAX_BODY_BYTES
from orchestrator.gateway.http.problem import HttpError, headers_of, problem_of, status_of
from placement.errors import HeterodyneError

ABORT = "abort"
"""The key, in the state of a scope, of what closes the connection at once, whatever waits to be sent."""

# How long a client may take to make room for the last words of an exchange, once its time is up.
_LAST_WORDS_S = 3.0
_EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """The client closed the connection."""


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Returns a JSON object in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


class Connection:
    """One request and its response. Lives on one event loop.

    Args:
        request_id: what the response says the request is called.
        timeout_s: how long the request may take; as long its client may be slow to read.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, request_id: str, timeout_s: float) -> None:
        self.headers = Headers(scope=scope)
        self._abort = scope.get("state", {}).get(ABORT)
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._end_s = time.monotonic() + timeout_s
        self._is_stream = False
        self._lock = asyncio.Lock()  # answers of several prompts are sent by several tasks

    async def read_json(self, timeout_s: float) -> bytes:
        """Returns the body. Raises as the function of that name does."""
        return await read_json(self.headers, self._receive, timeout_s)

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` to its end, or cancels it as soon as the client goes."""
        working = asyncio.ensure_future(work)
        going = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for task in (working, going):
                task.cancel()
            # What is cancelled still gives back what it holds.
            await asyncio.gather(working, going, return_exceptions=True)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def send_json(self, value: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        """Sends the whole response."""
        body = json_bytes(value)
        length = {"content-type": "application/json", "content-length": str(len(body))}
        await self._start(status, {**length, **headers})
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, objects: Sequence[Mapping[str, Any]]) -> None:
        """Sends each object as a server-sent event; returns when there is room for the next ones."""
        if not objects:
            return
        async with self._lock:
            if not self._is_stream:
                self._is_stream = True
                await self._start(200, _EVENT_STREAM)
            await self._send(_body(b"".join([b"data: %s\n\n" % json_bytes(each) for each in objects])))

    async def end_stream(self, objects: Sequence[Mapping[str, Any]]) -> None:
        """Sends the last objects and the mark that they are the last."""
        async with self._last_words():
            await self.stream(objects)
            async with self._lock:
                await self._send({"type": "http.response.body", "body": _DONE})

    async def send_problem(self, error: HeterodyneError) -> None:
        """Sends the error: as the response, or in the midst of a stream as its last object."""
        if self._is_stream:
            await self.end_stream([problem_of(error)])
        else:
            async with self._last_words():
                await self.send_json(problem_of(error), status=status_of(error), headers=headers_of(error))

    @contextlib.asynccontextmanager
    async def _last_words(self) -> AsyncIterator[None]:
        """Closes the connection of a client that makes no room for what is left to say."""
        try:
            async with asyncio.timeout(max(self._end_s - time.monotonic(), _LAST_WORDS_S)):
                yield
        except TimeoutError:
            if self._abort is not None:
                self._abort()
                await asyncio.sleep(0)  # the server hears of it in the next turn of the loop

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        named = {**headers, "x-request-id": self._request_id}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def read_json(headers: Headers, receive: Receive, timeout_s: float) -> bytes:
    """Returns the body of a request.

    Raises:
        HttpError: it is too large, or does not come in time, or is not marked as JSON: what is not, a page of another
            site may have a browser send without being asked whether it may.
        Gone: the client went.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "the body has to be JSON: send the header Content-Type: application/json")
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(receive)
    except TimeoutError:
        raise HttpError(408, "the body did not come in time") from None


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise HttpError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        if not message.get("more_body", False):
            return bytes(body)
