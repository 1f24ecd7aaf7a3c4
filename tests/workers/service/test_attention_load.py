"""A rank that is loaded as an attention worker: it reads no file, serves sessions, describes itself and ends."""

import asyncio
import time
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from kernels.select import kernels_for
from placement.errors import InvalidRequest
from placement.serving.offload.orders import StepOrder
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.gateway.leader_stream import EPOCH
from tests.support.offload.sessions import DEADLINE_S, SECRET, geometry_of
from tests.support.worker import running
from workers.attention_worker.client import connect
from workers.attention_worker.errors import AttentionLost
from workers.host.device import open_device
from workers.startup.holding import open_attention_worker
from workers.transport.mesh import listen


async def test_a_rank_without_a_model_holds_keys_and_values_until_it_is_stopped() -> None:
    async with running() as (worker, stub):
        attention = pb.AttentionLoad(kv_cache_bytes=1 << 20, secret=SECRET)
        phases = [r.phase async for r in stub.Load(pb.LoadRequest(epoch=EPOCH, attention=attention))]
        assert phases[-1] == pb.LOAD_PHASE_READY
        described = await stub.Describe(pb.DescribeRequest(epoch=EPOCH))
        assert (described.kv_bytes, described.weight_bytes) == (1 << 20, 0)
        assert not described.HasField("load")
        session = await asyncio.to_thread(
            connect,
            ("127.0.0.1", worker.ranks_port),
            name="box",
            worker=0,
            epoch=1,
            secret=SECRET,
            replica="replica-0",
            rank=0,
            geometry=geometry_of(),
            resumes=False,
            deadline_s=time.monotonic() + DEADLINE_S,
        )
        assert not session.welcome.resumed
        await worker.stop(grace_s=5.0)
        with pytest.raises(AttentionLost):
            await asyncio.to_thread(session.flush)
            for _ in range(1000):
                session.order(StepOrder())
        session.close()


@pytest.mark.parametrize(
    ("kv_cache_bytes", "secret", "code"),
    [
        (0, SECRET, grpc.StatusCode.INVALID_ARGUMENT),
        (1 << 20, b"short", grpc.StatusCode.INVALID_ARGUMENT),
        (1 << 60, SECRET, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_an_impossible_load_is_refused(kv_cache_bytes: int, secret: bytes, code: grpc.StatusCode) -> None:
    async with running() as (_, stub):
        attention = pb.AttentionLoad(kv_cache_bytes=kv_cache_bytes, secret=secret)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in stub.Load(pb.LoadRequest(epoch=EPOCH, attention=attention)):
                pass
        assert refused.value.code() is code


async def test_code_is_compiled_before_the_worker_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    attended: list[tuple[torch.dtype, tuple[int, ...]]] = []
    variant = kernels_for("cpu")

    def attend_parts(query: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        attended.append((query.dtype, tuple(query.shape)))
        return attend(query, *given)

    attend = variant.attend_parts
    monkeypatch.setattr(variant, "attend_parts", attend_parts)
    dtypes = [pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16]
    load = pb.AttentionLoad(kv_cache_bytes=1 << 20, secret=SECRET, dtypes=dtypes, head_dim=32)
    with listen("127.0.0.1") as listener:
        open_attention_worker(load, open_device("cpu", 1), listener)
        assert attended == [(torch.float32, (1, 1, 32)), (torch.bfloat16, (1, 1, 32))]
        load.head_dim = -1
        with pytest.raises(InvalidRequest, match="head_dim"):
            open_attention_worker(load, open_device("cpu", 1), listener)
