"""HTTP, byte for byte, over a replica that says what a test wants."""

import asyncio
import contextlib
import socket
from typing import Any

import pytest
from google.rpc import code_pb2

from orchestrator.gateway import generate
from orchestrator.gateway.fleet.inbox import Lost
from orchestrator.gateway.http import connection, server
from orchestrator.gateway.http.asking.body import MAX_BODY_BYTES
from protos.heterodyne.worker.v1 import worker_pb2
from tests.support.clocks import PATIENCE_S, until
from tests.support.gateway.chat_templates import CHATML
from tests.support.gateway.generating import LENGTH, STOP, token, told
from tests.support.gateway.http_calls import DONE, Reply, connected, post, request_bytes
from tests.support.gateway.stub_gateway import EPOCH, StubGateway, served_model, stub_gateway

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TURNS = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
USER = [{"role": "user", "content": "b"}]


def asked(gateway: StubGateway, path: str, **body: Any) -> "asyncio.Task[Reply]":
    return asyncio.create_task(post(gateway.http, path, body))


async def only(gateway: StubGateway) -> worker_pb2.Fork:
    (fork,) = (await told(gateway.worker)).forks
    return fork


async def test_a_streamed_chat_is_what_the_openai_api_has() -> None:
    async with stub_gateway(served_model(chat_template=TURNS)) as gateway:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        asking = asked(gateway, CHAT, messages=USER, request_id="me", **options)
        fork = await only(gateway)
        gateway.worker.step(token(fork, 0, 0))
        gateway.worker.step(token(fork, 1, 2, end=STOP))
        reply = await asking
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = reply.events()
        kinds = {(event["id"][:9], event["object"], event["model"]) for event in events}
        assert kinds == {("chatcmpl-", "chat.completion.chunk", "letters")}
        first, *middle, last = events
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in middle) == "ac"
        assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 2) + ["stop"]
        assert {event["usage"] for event in events[:-1]} == {None}
        assert last["choices"] == []
        used = {key: last["usage"][key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
        assert used == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


async def test_without_include_usage_no_chunk_has_usage() -> None:
    async with stub_gateway(served_model()) as gateway:
        asking = asked(gateway, COMPLETIONS, prompt="ab", stream=True)
        gateway.worker.step(token(await only(gateway), 0, 0, end=LENGTH))
        (event,) = (await asking).events()
        assert "usage" not in event
        choice = event["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("a", "length")


async def test_an_error_in_the_midst_of_a_stream_is_its_last_object() -> None:
    async with stub_gateway(served_model()) as gateway:
        asking = asked(gateway, COMPLETIONS, prompt="ab", stream=True)
        fork = await only(gateway)
        gateway.worker.step(token(fork, 0, 0))
        gateway.worker.step(token(fork, 5, 0))  # out of order
        reply = await asking
        assert reply.status == 200
        *chunks, last = reply.events()
        assert "".join(event["choices"][0]["text"] for event in chunks) == "a"
        assert last["error"]["type"] == "server_error" and last["error"]["message"]


async def test_an_error_in_the_midst_of_an_answer_in_one_piece_is_its_status() -> None:
    async with stub_gateway(served_model()) as gateway:
        asking = asked(gateway, COMPLETIONS, prompt="ab")
        fork = await only(gateway)
        gateway.worker.reject(fork.sequence_id, code_pb2.UNAVAILABLE, "no room")
        reply = await asking
        assert (reply.status, reply.json()["error"]["code"]) == (503, "unavailable")


async def test_a_refused_request_is_told_when_to_come_back() -> None:
    async with stub_gateway(served_model(), max_in_flight=1, max_queued=0) as gateway:
        first = asked(gateway, COMPLETIONS, prompt="ab")
        fork = await only(gateway)
        for stream in (False, True):
            reply = await post(gateway.http, COMPLETIONS, {"prompt": "ab", "stream": stream})
            assert reply.status == 429
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        gateway.worker.step(token(fork, 0, 0, end=LENGTH))
        assert (await first).status == 200


async def test_a_request_whose_time_is_up_ends_so() -> None:
    async with stub_gateway(served_model(), request_timeout_s=0.3) as gateway:
        asking = asked(gateway, COMPLETIONS, prompt="ab")
        fork = await only(gateway)
        reply = await asking
        assert (reply.status, reply.json()["error"]["code"]) == (504, "timeout")
        assert await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) == fork.sequence_id


@pytest.mark.parametrize("stream", [False, True])
async def test_the_computation_stops_when_the_connection_drops(stream: bool) -> None:
    async with stub_gateway(served_model()) as gateway, connected(gateway.http) as (reader, writer):
        writer.write(request_bytes(COMPLETIONS, {"prompt": "ab", "stream": stream}))
        fork = await only(gateway)
        if stream:
            gateway.worker.step(token(fork, 0, 0))
            await reader.readuntil(b'"text":"a"')
        writer.close()
        assert await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) == fork.sequence_id
        await until(lambda: gateway.admission.in_flight == 0)
        assert len(gateway.generator.journal) == 0


async def test_one_of_several_prompts_that_fails_ends_all() -> None:
    async with stub_gateway(served_model()) as gateway:
        asking = asked(gateway, COMPLETIONS, prompt=["ab", "cd", "ef"])
        forks = [await only(gateway) for _ in range(3)]
        gateway.worker.reject(forks[1].sequence_id, code_pb2.UNAVAILABLE, "no room")
        assert (await asking).status == 503
        cancelled = {await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) for _ in range(2)}
        assert cancelled == {forks[0].sequence_id, forks[2].sequence_id}
        await until(lambda: gateway.admission.in_flight == 0)


async def test_choices_of_several_prompts_are_numbered_in_their_order() -> None:
    async with stub_gateway(served_model()) as gateway:
        asking = asked(gateway, COMPLETIONS, prompt=[[0], [1]], n=2, max_tokens=1, return_token_ids=True)
        submits = {tuple(submit.prompt_ids): submit.forks for submit in [await told(gateway.worker) for _ in range(2)]}
        drawn = {fork.sequence_id: number for number, fork in enumerate([*submits[0,], *submits[1,]])}
        for fork in reversed([*submits[0,], *submits[1,]]):
            gateway.worker.step(token(fork, 0, drawn[fork.sequence_id], end=LENGTH))
        reply = (await asking).json()
        assert [choice["token_ids"] for choice in reply["choices"]] == [[0], [1], [2], [3]]
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
        assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (2, 4)


async def test_a_client_that_does_not_read_loses_its_slot_and_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LAST_WORDS_S", 0.0)
    monkeypatch.setattr(generate, "_LAST_WORD_S", 0.2)
    async with stub_gateway(served_model(context=2**20), request_timeout_s=1.0) as gateway:
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        small.setblocking(False)
        host, _, port = gateway.http.rpartition(":")
        with small:
            await asyncio.get_running_loop().sock_connect(small, (host, int(port)))
            # The echo is far more than the buffers between hold.
            body = {"prompt": [1] * 900_000, "echo": True, "stream": True, "return_token_ids": True}
            await asyncio.get_running_loop().sock_sendall(small, request_bytes(COMPLETIONS, body))
            fork = await only(gateway)
            assert await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) == fork.sequence_id
            await until(lambda: gateway.admission.in_flight == 0)
            async with asyncio.timeout(PATIENCE_S):
                end = await received(small)
            assert DONE.encode() not in end


async def received(connected: socket.socket) -> bytes:
    """The last of what still comes, until the other side has closed."""
    end = b""
    with contextlib.suppress(ConnectionResetError):
        while data := await asyncio.get_running_loop().sock_recv(connected, 1 << 16):
            end = (end + data)[-100:]
    return end


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        (COMPLETIONS, {"prompt": "a"}, {"content_type": "text/plain"}, 415, "Content-Type: application/json"),
        (COMPLETIONS, b'{"prompt": ', {}, 400, "is not JSON"),
        (COMPLETIONS, b" " * (MAX_BODY_BYTES + 1), {}, 413, "larger than"),
        (COMPLETIONS, b'{"prompt": "\\ud800"}', {}, 400, "is not JSON"),
        (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', {}, 400, "temperature"),
        ("/v1/nothing", {}, {}, 404, "no /v1/nothing"),
        ("/v1/models", {}, {}, 405, "POST"),
    ],
)
async def test_what_is_wrong_as_http_is_refused_in_the_apis_form(
    path: str, body: Any, headers: dict[str, str], status: int, words: str
) -> None:
    async with stub_gateway(served_model()) as gateway:
        reply = await post(gateway.http, path, body, **headers)
        assert reply.status == status
        error = reply.json()["error"]
        assert words in error["message"] and error["type"] == "invalid_request_error"


async def test_a_connection_that_asks_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_FIRST_REQUEST_S", 0.05)
    async with stub_gateway(served_model()) as gateway, connected(gateway.http) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\n")  # and no more of it
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""


async def test_a_connection_serves_several_requests_one_after_the_other() -> None:
    async with stub_gateway(served_model()) as gateway, connected(gateway.http) as (reader, writer):
        for index in range(3):
            writer.write(request_bytes(COMPLETIONS, {"prompt": "ab", "stream": index == 1}))
            gateway.worker.step(token(await only(gateway), 0, index, end=LENGTH))
            await asyncio.wait_for(reader.readuntil(f'"text":"{"abc"[index]}"'.encode()), PATIENCE_S)
            if index == 1:
                await reader.readuntil(b"[DONE]\n\n\r\n0\r\n\r\n")


async def test_an_id_of_the_clients_names_the_request_everywhere() -> None:
    async with stub_gateway(served_model()) as gateway:
        asking = asyncio.create_task(post(gateway.http, COMPLETIONS, {"prompt": "ab"}, x_request_id="mine-1"))
        fork = await only(gateway)
        (entry,) = gateway.generator.journal.on_replica("replica-0", EPOCH)
        assert entry.request_id == "mine-1"
        gateway.worker.step(token(fork, 0, 0, end=LENGTH))
        reply = await asking
        assert (reply.headers["x-request-id"], reply.json()["id"]) == ("mine-1", "cmpl-mine-1")


async def test_a_template_that_takes_no_tools_is_told_of_none() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    async with stub_gateway(served_model(chat_template=CHATML, context=512)) as gateway:
        reply = await post(gateway.http, CHAT, {"messages": USER, "tools": [tool]})
        assert reply.status == 400 and reply.json()["error"]["param"] == "tools"


async def test_health_says_whether_a_request_would_be_taken() -> None:
    async with stub_gateway(served_model()) as gateway:
        assert (await post(gateway.http, "/health", b"", method="GET")).status == 200
        gateway.leader.give_up(Lost(cause="a test"))
        assert (await post(gateway.http, "/health", b"", method="GET")).status == 503
