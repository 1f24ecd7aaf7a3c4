"""Fetches that are revoked, dropped, or meet a replica that falls silent, against a leader that a test plays."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from placement.model.part import Part, Span
from placement.model.specs import DType
from placement.serving.events import Receive
from placement.serving.kv import streaming
from placement.serving.kv.peers import KvFormat, ReplicaRanks
from protos.codec.replica_ranks import ranks_message
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc
from tests.support.planning import MODEL
from workers.engine.inbox import KvCame
from workers.engine.types import PrefillSource, Submission
from workers.replica.kv_leader import Expectation
from workers.sampling.sampling import SamplingParams
from workers.service import prefill_client
from workers.service.kv_exchange import KvFetcher

WAIT_S = 30.0
EPOCH = 3


def ranks(epoch: int) -> ReplicaRanks:
    return ReplicaRanks(
        epoch=epoch,
        incarnation=bytes([epoch] * 16),
        parts=(Part.whole(MODEL),),
        addresses=(("127.0.0.1", 1),),
        dtype=DType.FLOAT32,
        block_size=4,
    )


class Engine:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[KvCame] = asyncio.Queue()

    def kv_came(self, message: KvCame) -> None:
        self.came.put_nowait(message)


class Leader:
    """Ranks that are ready at once, and whose keys and values come when a test says so."""

    def __init__(self) -> None:
        self.arrived: list[Future[int]] = []

    def expect(self, expected: object) -> Expectation:
        ready: Future[None] = Future()
        ready.set_result(None)
        self.arrived.append(Future())
        return Expectation(ready=ready, arrived=self.arrived[-1])


class Source(worker_pb2_grpc.WorkerServicer):
    """A replica that says what it is told to say, and then nothing."""

    def __init__(self, *says: pb.PrefillResponse) -> None:
        self.says = says
        self.asked: list[pb.PrefillStart] = []
        self.ended = asyncio.Event()

    async def DescribeRanks(self, request: pb.DescribeRanksRequest, context: Any) -> pb.ReplicaRanks:
        return ranks_message(ranks(EPOCH))

    async def Prefill(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.PrefillResponse]:  # type: ignore[override]
        try:
            self.asked.append((await anext(aiter(request_iterator))).start)
            for response in self.says:
                response.epoch = EPOCH
                yield response
            await asyncio.Event().wait()
        finally:
            self.ended.set()


COMPUTED = pb.PrefillResponse(computed=pb.PrefillComputed(prefill_s=0.5))
PROGRESS = pb.PrefillResponse(progress=pb.PrefillProgress())


@asynccontextmanager
async def fetcher(source: Source) -> AsyncIterator[tuple[KvFetcher, Engine, Leader, PrefillSource]]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(source, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    engine, leader = Engine(), Leader()
    found: Any = KvFetcher(
        engine=engine,  # type: ignore[arg-type]
        leader=leader,  # type: ignore[arg-type]
        own=ranks(4),
        model=MODEL,
        kv_format=KvFormat.NATIVE,
    )
    try:
        yield found, engine, leader, PrefillSource(replica="p", epoch=EPOCH, address=f"127.0.0.1:{port}")
    finally:
        await found.close_all()
        await server.stop(None)


def ask(found: KvFetcher, source: PrefillSource, hold_id: int = 1) -> None:
    submission = Submission(
        prompt_ids=tuple(range(3, 20)),
        sampling=SamplingParams(),
        max_tokens=1,
        stop_token_ids=frozenset(),
        prefill=source,
    )
    found.receive(Receive(sequence_id=1, hold_id=hold_id, tokens=Span(0, 16), table=[0, 1, 2, 3, 4]), submission)


async def came(engine: Engine) -> KvCame:
    async with asyncio.timeout(WAIT_S):
        return await engine.came.get()


async def test_what_is_revoked_before_it_began_is_told_of_all_the_same() -> None:
    async with fetcher(Source()) as (found, engine, _, source):
        ask(found, source)
        found.revoke(1)  # both are taken in one turn of the loop
        message = await came(engine)
        assert (message.hold_id, message.num_tokens) == (1, 0) and message.transfer.problem
        assert not found.num_failures, "nobody failed"


async def test_what_is_revoked_under_way_ends_the_call() -> None:
    played = Source(PROGRESS)
    async with fetcher(played) as (found, engine, leader, source):
        ask(found, source)
        async with asyncio.timeout(WAIT_S):
            while not (played.asked and leader.arrived):
                await asyncio.sleep(0.01)
        found.revoke(1)
        assert (await came(engine)).num_tokens == 0
        async with asyncio.timeout(WAIT_S):
            await played.ended.wait()


@pytest.mark.parametrize(
    "says", [(), (PROGRESS,), (COMPUTED,)], ids=["nothing", "that it computes", "that it has computed"]
)
async def test_a_source_that_falls_silent_is_given_up_within_its_lease(
    says: tuple[pb.PrefillResponse, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_client, "LEASE_S", 0.3)
    async with fetcher(Source(*says)) as (found, engine, _, source):
        ask(found, source)
        message = await came(engine)
        assert message.num_tokens == 0 and "nothing was heard of it" in message.transfer.problem
        assert found.num_failures == 1


async def test_what_arrives_before_its_source_has_said_so_is_used_only_then() -> None:
    """A step that failed after it wrote keys and values must not be believed."""
    async with fetcher(Source(PROGRESS, COMPUTED)) as (found, engine, leader, source):
        ask(found, source)
        async with asyncio.timeout(WAIT_S):
            while not leader.arrived:
                await asyncio.sleep(0.01)
        leader.arrived[0].set_result(4096)
        message = await came(engine)
        assert (message.num_tokens, message.transfer.num_bytes, message.transfer.prefill_s) == (16, 4096, 0.5)
        assert streaming.LEASE_S > 0 and found.num_transfers == 1


async def test_another_epoch_in_an_answer_is_refused() -> None:
    played = Source(PROGRESS)
    async with fetcher(played) as (found, engine, _, source):
        fenced = PrefillSource(replica="p", epoch=EPOCH + 1, address=source.address)
        ask(found, fenced)
        message = await came(engine)
        assert message.num_tokens == 0 and "epoch" in message.transfer.problem
