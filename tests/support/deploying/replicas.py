"""Replicas of several ranks as worker services in this process, over real connections, that serve and exchange KV."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from placement.model.hf import read_model_spec
from placement.planning.layout import ReplicaLayout, Split, StageLayout, cut
from protos.codec.parts import shard_message
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc
from tests.support.gateway.leader_stream import submit_forks
from tests.support.worker import connected, load_request
from workers.host.device import open_device
from workers.host.model_files import read_json
from workers.service.server import WorkerService
from workers.transport.mesh import listen

LOAD_S = 120.0
ANSWER_S = 120.0
LAYOUTS: dict[str, tuple[tuple[float, ...], ...] | tuple[Split, tuple[float, ...]]] = {
    "tp1": ((1,),),
    "tp2": ((3, 1),),
    "pp2": ((1,), (1,)),
    "sp2": ("sequence", (3, 1)),
}


def layout(name: str) -> ReplicaLayout:
    """One of the layouts, by its name: a rank alone, a tensor split of 3:1, two stages, stripes of 3:1."""
    kind = LAYOUTS[name]
    if isinstance(kind[0], str):
        weights = kind[1]
        return ReplicaLayout(stages=(StageLayout(devices=(0, 1), weights=tuple(weights), split="sequence"),))
    stages, first = [], 0
    for weights in kind:
        stages.append(StageLayout(devices=tuple(range(first, first + len(weights))), weights=tuple(weights)))
        first += len(weights)
    return ReplicaLayout(stages=tuple(stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A replica that serves.

    Attributes:
        stub: of its leader, which listens at ``address``.
        services: of all ranks.
    """

    name: str
    epoch: int
    stub: Any
    address: str
    services: tuple[WorkerService, ...]

    @property
    def source(self) -> pb.PrefillSource:
        """Where others have prompts computed by it."""
        return pb.PrefillSource(replica=self.name, epoch=self.epoch, address=self.address)

    async def load_report(self) -> pb.LoadReport:
        """Of this moment."""
        described = await self.stub.Describe(pb.DescribeRequest(epoch=self.epoch))
        return described.load


@asynccontextmanager
async def replica(name: str, path: Path, kind: str, *, epoch: int = 41, **fields: Any) -> AsyncIterator[Replica]:
    """Loads a checkpoint, cut as the layout ``kind`` says, by workers in this process."""
    request = load_request(path, epoch=epoch, **fields)
    model = read_model_spec(read_json(path, "config.json", 1 << 24))
    parts = [
        part for stage in cut(model, layout(kind), block_size=request.block_size, field="layout") for part in stage
    ]
    async with AsyncExitStack() as stack:
        ranks = [await stack.enter_async_context(service(epoch)) for _ in parts]
        members = [
            pb.Member(host="127.0.0.1", port=port, shard=shard_message(rank, part))
            for rank, (part, (_, _, port)) in enumerate(zip(parts, ranks, strict=True))
        ]
        stubs = [await stack.enter_async_context(connected(address)) for _, address, _ in ranks]
        request.token = hashlib.sha256(f"{name} {epoch}".encode()).digest()
        await _load(stubs, request, members)
        services = tuple(service for service, _, _ in ranks)
        yield Replica(name=name, epoch=epoch, stub=stubs[0], address=ranks[0][1], services=services)


async def _load(stubs: Sequence[Any], request: pb.LoadRequest, members: Sequence[pb.Member]) -> None:
    async def load(stub: Any, member: pb.Member) -> None:
        own = pb.LoadRequest()
        own.CopyFrom(request)
        own.shard.CopyFrom(member.shard)
        own.members.extend(members)
        async for _ in stub.Load(own, timeout=LOAD_S):
            pass

    await asyncio.gather(*map(load, stubs, members))


@asynccontextmanager
async def service(epoch: int) -> AsyncIterator[tuple[WorkerService, str, int]]:
    """A worker in this process, with its address and the port for other ranks."""
    with listen("127.0.0.1") as listener:
        server = grpc.aio.server()
        worker = WorkerService(device=open_device("cpu", 1), epoch=epoch, listener=listener)
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
        bound = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield worker, f"127.0.0.1:{bound}", listener.getsockname()[1]
        finally:
            await worker.stop(5.0)
            await server.stop(None)
            worker.close()


class Stream:
    """A leader stream to a replica, as a gateway has it."""

    def __init__(self, to: Replica) -> None:
        self._to = to
        self._call = to.stub.Lead()
        self._next_id = 1

    async def submit(self, *, num_forks: int = 1, source: Replica | None = None, **fields: Any) -> list[int]:
        """Submits sequences of one prompt, which ``source`` computes, and returns their ids."""
        ids = list(range(self._next_id, self._next_id + num_forks))
        self._next_id += num_forks
        if source is not None:
            fields["prefill"] = source.source
        own = {name: fields.pop(name) for name in ("prompt_logprobs",) if name in fields}
        forks = [pb.Fork(sequence_id=sequence_id, seed=sequence_id, **own) for sequence_id in ids]
        await self._call.write(submit_forks(*forks, epoch=self._to.epoch, **fields))
        return ids

    async def cancel(self, sequence_id: int) -> None:
        """Nobody wants a sequence any more."""
        await self._call.write(pb.LeadRequest(epoch=self._to.epoch, cancel=pb.Cancel(sequence_id=sequence_id)))

    async def answers(self, ids: Sequence[int]) -> dict[int, list[pb.SequenceOutput]]:
        """All outputs of some sequences, to their ends."""
        found: dict[int, list[pb.SequenceOutput]] = {sequence_id: [] for sequence_id in ids}
        async with asyncio.timeout(ANSWER_S):
            while not all(outputs and outputs[-1].HasField("end") for outputs in found.values()):
                message = await self._call.read()
                assert isinstance(message, pb.LeadResponse), "the stream ended"
                assert not message.HasField("rejected"), message.rejected
                for output in message.step.sequences:
                    if output.sequence_id in found:
                        found[output.sequence_id].append(output)
        return found

    async def answer(self, **fields: Any) -> list[pb.SequenceOutput]:
        """All outputs of one sequence."""
        (sequence_id,) = await self.submit(**fields)
        return (await self.answers([sequence_id]))[sequence_id]

    def close(self) -> None:
        """Ends the stream."""
        self._call.cancel()


def tokens(outputs: Sequence[pb.SequenceOutput]) -> list[int]:
    """The tokens of an answer."""
    return [output.token_id for output in outputs if output.HasField("index")]


def transfer(outputs: Sequence[pb.SequenceOutput]) -> pb.KvTransfer | None:
    """What became of the keys and values of the prompt."""
    return next((output.transfer for output in outputs if output.HasField("transfer")), None)


async def settled(*replicas: Replica, timeout_s: float = 60.0) -> None:
    """Waits until no replica holds a block."""
    async with asyncio.timeout(timeout_s):
        for each in replicas:
            while (load := await each.load_report()).free_blocks < load.total_blocks or load.num_moving:
                await asyncio.sleep(0.02)
