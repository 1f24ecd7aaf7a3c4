"""Requests to the HTTP API, byte for byte, and what comes back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.clocks import PATIENCE_S

DONE = "[DONE]"


@dataclass(frozen=True)
class Reply:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The server-sent events; the last must be the mark of the end."""
        *lines, last = self.body.decode().split("\n\n")
        assert last == "" and all(line.startswith("data: ") for line in lines), self.body
        datas = [line.removeprefix("data: ") for line in lines]
        assert datas.pop() == DONE
        return [json.loads(data) for data in datas]


def request_bytes(path: str, body: Any, *, method: str = "POST", **headers: str) -> bytes:
    """A request; a body that is no bytes is written as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"host": "test", "content-type": "application/json", "content-length": str(len(data))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), "", ""]
    return "\r\n".join(lines).encode() + data


@asynccontextmanager
async def connected(address: str, **options: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection of one's own."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), **options)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def post(address: str, path: str, body: Any, *, method: str = "POST", **headers: str) -> Reply:
    """What the request is answered."""
    async with asyncio.timeout(PATIENCE_S), connected(address) as (reader, writer):
        writer.write(request_bytes(path, body, method=method, connection="close", **headers))
        await writer.drain()
        return parse(await reader.read())


def parse(data: bytes) -> Reply:
    """Reads a response whose connection has ended."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return Reply(status=int(first.split()[1]), headers=headers, body=body)


def unchunked(body: bytes) -> bytes:
    """Joins the chunks of a body; the last must be there."""
    joined = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        count = int(size, 16)
        if not count:
            return joined
        joined, body = joined + body[:count], body[count + 2 :]
