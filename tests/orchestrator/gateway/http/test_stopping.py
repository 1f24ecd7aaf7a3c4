"""What a service that stops does to its HTTP clients, and where it listens."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from orchestrator.config.types import Address
from orchestrator.gateway.http.server import HttpServer
from placement.errors import InvalidConfig
from tests.support.clocks import PATIENCE_S, until
from tests.support.deploying.deployment import deploy, make_config
from tests.support.gateway.http_calls import connected, parse, post, request_bytes

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "In the beginning", "max_tokens": 300, "ignore_eos": True, "stream": True}


async def test_a_drain_refuses_what_is_new_and_finishes_what_runs(served_checkpoint: Path, tmp_path: Path) -> None:
    async with deploy(make_config(tmp_path, served_checkpoint)) as running:
        address = running.gateway.http_address
        assert address is not None
        # A slot of the test's own keeps the service up until all was seen.
        async with running.gateway.admission.slot(), connected(address) as (reader, writer):
            writer.write(request_bytes(COMPLETIONS, LONG))
            begun = await reader.readuntil(b"data: ")
            drain = asyncio.create_task(running.gateway.drain())
            await until(lambda: running.gateway.admission.draining)
            refused = await post(address, COMPLETIONS, LONG)
            assert (refused.status, refused.json()["error"]["code"]) == (503, "unavailable")
            assert (await post(address, "/health", b"", method="GET")).status == 503
            rest = await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")
            events = parse(begun + rest).events()
            assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert await drain
        with pytest.raises(ConnectionRefusedError):
            await post(address, COMPLETIONS, LONG)


async def test_a_cut_drain_says_so_to_those_whose_stream_had_not_begun(served_checkpoint: Path, tmp_path: Path) -> None:
    async with deploy(make_config(tmp_path, served_checkpoint, gateway={"drain_grace_s": 0.1})) as running:
        address = running.gateway.http_address
        assert address is not None
        os.kill(running.pid("replica-0"), signal.SIGSTOP)  # so that it cannot finish by itself
        asked = asyncio.create_task(post(address, COMPLETIONS, LONG))
        await until(lambda: running.gateway.admission.in_flight == 1 and len(running.gateway.generator.journal) == 1)
        assert not await running.gateway.drain()
        os.kill(running.pid("replica-0"), signal.SIGCONT)
        reply = await asyncio.wait_for(asked, PATIENCE_S)
        assert reply.status == 503 and "the service was stopped" in reply.json()["error"]["message"]


async def test_an_address_in_use_is_refused_and_named() -> None:
    async def application(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nobody asks")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = HttpServer(application, Address("127.0.0.1", taken.getsockname()[1]))
        with pytest.raises(InvalidConfig) as caught:
            await server.start()
    assert caught.value.field == "gateway.http_address"
    await server.stop()


async def test_it_takes_no_signal_and_listens_on_loopback_of_both_kinds() -> None:
    async def application(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nobody asks")

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for host in ("127.0.0.1", "::1"):
        server = HttpServer(application, Address(host, 0))
        address = await server.start()
        assert address.host == host and address.port > 0
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
        await server.stop()
