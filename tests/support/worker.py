"""A worker with no Ray, as a process of its own or as a service in this one: started, loaded, talked to."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from orchestrator.launcher.process import WorkerArgs, WorkerProcess
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc
from tests.support.gateway.leader_stream import EPOCH
from workers.host.device import open_device
from workers.service.server import WorkerService

WHOLE = pb.Shard(layers={"stop": 2}, kv_heads={"stop": 2}, ffn_columns={"stop": 96}, vocab_rows={"stop": 509})
_READ_S = 30.0

# A worker whose prompts of 5 tokens meet with an accident.
_WORKER_WITH = """
import ctypes, signal, sys, time
from workers import __main__ as worker
from workers.step import runner

def execute(self, number, prepared):
    if len(prepared.batch.sequences[0].token_ids) == 5:
        {accident}
    {always}
    return sampled(self, number, prepared)

sampled, runner.ModelRunner._execute = runner.ModelRunner._execute, execute
{more}
sys.exit(worker.main())
"""


def worker_with(accident: str, *, always: str = "pass", more: str = "") -> list[str]:
    """The command line of a worker that runs the statements where a step begins with a prompt of 5 tokens."""
    return [sys.executable, "-c", _WORKER_WITH.format(accident=accident, always=always, more=more)]


def have_accident(monkeypatch: pytest.MonkeyPatch, accident: str, **more: str) -> None:
    """Workers that are started from now on are such."""
    argv = WorkerArgs.argv
    monkeypatch.setattr(WorkerArgs, "argv", lambda self: [*worker_with(accident, **more), *argv(self)[3:]])


def load_request(path: Path, **fields: Any) -> pb.LoadRequest:
    base: dict[str, Any] = {
        "epoch": EPOCH,
        "model_path": str(path),
        "dtype": pb.DTYPE_FLOAT32,
        "shard": WHOLE,
        "block_size": 8,
        "num_blocks": 64,
        "token_budget": 32,
        "max_num_seqs": 8,
        "max_context_tokens": 256,
    }
    return pb.LoadRequest(**base | fields)


@asynccontextmanager
async def running(**fields: Any) -> AsyncIterator[tuple[WorkerProcess, Any]]:
    base: dict[str, Any] = {"bind_host": "127.0.0.1", "device": "cpu", "num_threads": 1, "epoch": EPOCH}
    args = WorkerArgs(**base | fields)
    worker = await WorkerProcess.start(args, timeout_s=60.0)
    try:
        async with connected(worker.address) as stub:
            yield worker, stub
    finally:
        await worker.stop(grace_s=5.0)


@asynccontextmanager
async def running_here() -> AsyncIterator[Any]:
    """The stub of a worker's service in this process, for what does not depend on having one of its own."""
    server = grpc.aio.server()
    service = WorkerService(device=open_device("cpu", 1), epoch=EPOCH)
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with connected(f"127.0.0.1:{port}") as stub:
            yield stub
    finally:
        await service.stop(5.0)
        await server.stop(None)
        service.close()


@asynccontextmanager
async def connected(address: str, *options: tuple[str, int]) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield worker_pb2_grpc.WorkerStub(channel)


async def load(stub: Any, request: pb.LoadRequest) -> list[pb.LoadResponse]:
    return [message async for message in stub.Load(request, timeout=60.0)]


async def next_event(call: Any) -> pb.LeadResponse:
    async with asyncio.timeout(_READ_S):
        message = await call.read()
    assert isinstance(message, pb.LeadResponse)
    assert message.epoch == EPOCH
    return message


async def until(call: Any, wanted: str) -> Any:
    """The next event of that kind; others are lost."""
    while (message := await next_event(call)).WhichOneof("event") != wanted:
        pass
    return getattr(message, wanted)


async def outputs(call: Any, sequence_id: int) -> list[pb.SequenceOutput]:
    """All outputs of one sequence, to its end."""
    found: list[pb.SequenceOutput] = []
    while not (found and found[-1].HasField("end")):
        step = await until(call, "step")
        found += [output for output in step.sequences if output.sequence_id == sequence_id]
    return found


async def collect(call: Any, done: Callable[[dict[int, Any]], bool]) -> dict[int, Any]:
    """The last word to each sequence, its end or its refusal, once those that came make it true. None has two."""
    answers: dict[int, Any] = {}
    while not done(answers):
        message = await next_event(call)
        ends = [(output.sequence_id, output.end) for output in message.step.sequences if output.HasField("end")]
        if message.HasField("rejected"):
            ends.append((message.rejected.sequence_id, message.rejected))
        for sequence_id, answer in ends:
            assert sequence_id not in answers, (sequence_id, answer)
            answers[sequence_id] = answer
    return answers


async def status_of(call: Any) -> grpc.aio.AioRpcError:
    """How the other side ended the stream, once everything that came before is read."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while True:
            await next_event(call)
    return caught.value
