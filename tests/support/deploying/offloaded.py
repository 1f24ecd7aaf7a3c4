"""Attention workers as services in this process, and replicas whose keys and values they hold."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.model.hf import read_model_spec
from placement.planning.residency import Partition, resident
from protos.codec.residency import residency_message
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.deploying.replicas import Replica, replica, service
from tests.support.worker import connected, load_request
from workers.host.model_files import read_json
from workers.service.server import WorkerService

SECRET = bytes(range(32))
SIZES: dict[str, Any] = {"num_blocks": 96, "token_budget": 48, "max_context_tokens": 256, "prefix_cache": True}
_LOAD_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """An attention worker that listens for model ranks."""

    service: WorkerService
    host: str
    port: int

    @property
    def message(self) -> pb.AttentionWorker:
        """What model ranks are told of it."""
        return pb.AttentionWorker(host=self.host, port=self.port, name=f"box {self.port}")


@asynccontextmanager
async def box(
    *, epoch: int = 9, kv_cache_bytes: int = 64 << 20, secret: bytes = SECRET, port: int = 0
) -> AsyncIterator[Box]:
    """An attention worker in this process."""
    async with service(epoch) as (worker, address, ranks_port), connected(address) as stub:
        request = pb.LoadRequest(epoch=epoch, attention=pb.AttentionLoad(kv_cache_bytes=kv_cache_bytes, secret=secret))
        async for _ in stub.Load(request, timeout=_LOAD_S):
            pass
        yield Box(service=worker, host="127.0.0.1", port=ranks_port)


@asynccontextmanager
async def boxes(count: int, **fields: Any) -> AsyncIterator[list[Box]]:
    """Several attention workers."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(box(epoch=9 + index, **fields)) for index in range(count)]


def residency_of(
    path: Path,
    workers: Sequence[Box],
    partition: Partition,
    *,
    weights: Sequence[float] = (),
    num_local_blocks: int = 0,
    num_blocks: int = 96,
    block_size: int = 8,
    q_first: bool = False,
    staggered: bool = True,
    resumes: bool = False,
    replica: str = "replica-0",
) -> pb.KvResidency:
    """Where the keys and values of ``num_blocks`` blocks are."""
    model = read_model_spec(read_json(path, "config.json", 1 << 24))
    weights = weights or [1.0] * len(workers)
    remote, share = num_blocks - num_local_blocks, [num_blocks - num_local_blocks] * len(workers)
    if partition is Partition.REQUESTS:
        share = [remote // len(workers)] * len(workers)
        share[0] += remote - sum(share)
    found = resident(
        partition,
        weights,
        num_kv_heads=model.num_kv_heads,
        block_size=block_size,
        num_local_blocks=num_local_blocks,
        num_remote_blocks=share,
    )
    message = residency_message(found, [worker.message for worker in workers])
    message.MergeFrom(
        pb.KvResidency(secret=SECRET, q_first=q_first, staggered=staggered, resumes=resumes, replica=replica)
    )
    return message


@asynccontextmanager
async def offloaded(
    path: Path, workers: Sequence[Box], partition: Partition, *, kind: str = "tp1", epoch: int = 41, **fields: Any
) -> AsyncIterator[Replica]:
    """A replica, cut as ``kind`` says, whose keys and values attention workers hold."""
    own = {name: fields.pop(name) for name in list(fields) if name not in pb.LoadRequest.DESCRIPTOR.fields_by_name}
    sizes = load_request(path, **fields)
    residency = residency_of(path, workers, partition, num_blocks=sizes.num_blocks, block_size=sizes.block_size, **own)
    async with replica("offloaded", path, kind, epoch=epoch, residency=residency, **fields) as found:
        yield found


def group_checkpoint(checkpoint: Callable[..., Path], group: int) -> Path:
    """A model with so many query heads to a KV head."""
    return checkpoint(
        "llama", num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8 // group, hidden_size=64
    )
