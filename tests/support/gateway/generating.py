"""Generate through a gateway whose replica says what a test wants: requests, what the replica is told, and answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.v1 import inference_pb2_grpc
from protos.heterodyne.worker.v1 import worker_pb2
from tests.support.clocks import PATIENCE_S, until
from tests.support.gateway.stub_gateway import StubGateway, StubWorker, served_model, stub_gateway


@asynccontextmanager
async def serving(
    *, request_timeout_s: float = 2 * PATIENCE_S, has_helper: bool = False, **model: Any
) -> AsyncIterator[tuple[StubGateway, Any]]:
    async with (
        stub_gateway(served_model(**model), request_timeout_s=request_timeout_s, has_helper=has_helper) as gateway,
        grpc.aio.insecure_channel(gateway.address) as channel,
    ):
        yield gateway, inference_pb2_grpc.InferenceStub(channel)
        await until(lambda: gateway.admission.in_flight == 0)
        assert len(gateway.generator.journal) == 0


async def collect(call: Any) -> tuple[list[pb.GenerateResponse], grpc.StatusCode]:
    responses = []
    try:
        async for response in call:
            responses.append(response)
    except grpc.aio.AioRpcError:
        pass
    return responses, await call.code()


def ask(stub: Any, **fields: Any) -> "asyncio.Task[tuple[list[pb.GenerateResponse], grpc.StatusCode]]":
    return asyncio.create_task(
        collect(stub.Generate(pb.GenerateRequest(**({"prompt": "abc"} | fields)), timeout=PATIENCE_S))
    )


async def told(worker: StubWorker) -> worker_pb2.Submit:
    return await asyncio.wait_for(worker.submits.get(), PATIENCE_S)


async def submitted(worker: StubWorker, count: int = 1) -> list[worker_pb2.Fork]:
    """The sequences that the replica is handed next, of one request or several."""
    forks: list[worker_pb2.Fork] = []
    while len(forks) < count:
        forks += (await told(worker)).forks
    assert len(forks) == count
    return forks


def token(
    fork: worker_pb2.Fork, index: int, token_id: int, *, end: Any = None, **fields: Any
) -> worker_pb2.SequenceOutput:
    output = worker_pb2.SequenceOutput(sequence_id=fork.sequence_id, index=index, token_id=token_id, **fields)
    if end is not None:
        output.end.reason = end
    return output


LENGTH, STOP = worker_pb2.END_REASON_LENGTH, worker_pb2.END_REASON_STOP


def texts(responses: list[pb.GenerateResponse]) -> dict[int, str]:
    result: dict[int, str] = {}
    for response in responses:
        if response.HasField("chunk"):
            result[response.chunk.choice] = result.get(response.chunk.choice, "") + response.chunk.text
    return result
