"""A model rank is told over gRPC where an attention worker listens from now on."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc
from tests.support.gateway.leader_stream import EPOCH
from tests.support.worker import connected
from workers.attention_worker.whereabouts import Address, Whereabouts
from workers.host.device import open_device
from workers.service.server import WorkerService
from workers.startup.loading import Loaded

HERE = Address(host="10.0.0.1", port=4000, name="big-memory")


class LoadedService(WorkerService):
    """A worker that has loaded already."""

    def __init__(self, whereabouts: Whereabouts | None) -> None:
        super().__init__(device=open_device("cpu", 1), epoch=EPOCH)
        self._loaded = Loaded(whereabouts=whereabouts, weight_bytes=0, kv_bytes=0)


async def serve(whereabouts: Whereabouts | None) -> AsyncIterator[Any]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(LoadedService(whereabouts), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with connected(address) as stub:
        yield stub
    await server.stop(0.0)


@pytest.fixture
def whereabouts() -> Whereabouts:
    return Whereabouts([HERE, HERE])


@pytest_asyncio.fixture
async def stub(whereabouts: Whereabouts) -> AsyncIterator[Any]:
    async for it in serve(whereabouts):
        yield it


@pytest_asyncio.fixture
async def lonely() -> AsyncIterator[Any]:
    """Of a rank without attention workers."""
    async for it in serve(None):
        yield it


def move(worker: int = 1, *, epoch: int = EPOCH, port: int = 4001) -> pb.MoveAttentionRequest:
    address = pb.AttentionWorker(host="10.0.0.2", port=port, name="other")
    return pb.MoveAttentionRequest(epoch=epoch, worker=worker, address=address)


async def test_a_move_is_noted_for_the_steps(stub: Any, whereabouts: Whereabouts) -> None:
    assert (await stub.MoveAttention(move())).epoch == EPOCH
    assert whereabouts.of(1) == Address(host="10.0.0.2", port=4001, name="other") and whereabouts.of(0) == HERE
    assert whereabouts.num_moves == 1


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (move(epoch=EPOCH - 1), grpc.StatusCode.FAILED_PRECONDITION),
        (move(2), grpc.StatusCode.INVALID_ARGUMENT),
        (move(port=0), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_what_is_fenced_or_cannot_be_is_refused(
    stub: Any, whereabouts: Whereabouts, request_: pb.MoveAttentionRequest, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.MoveAttention(request_)
    assert caught.value.code() is code and whereabouts.num_moves == 0


async def test_a_rank_without_attention_workers_says_so(lonely: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await lonely.MoveAttention(move())
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "no attention workers" in (caught.value.details() or "")
