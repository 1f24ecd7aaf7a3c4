"""The process that asks the workers of ``split_exposed``, on the host of those that answer: loads, measures, prints."""

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from placement.model.hf import read_model_spec
from placement.planning.layout import cut
from protos.codec.parts import shard_message
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.deploying.replicas import Replica, Stream, layout, transfer
from tests.support.worker import connected, load
from workers.host.model_files import read_json

AT = "tests.benchmarks.disaggregation.split_driver"
BLOCK_SIZE = 16
AUTO_TOKENS = 4096
STEP_TIME_S = 0.5
_FIRST_ID = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What is measured once in each repeat.

    Attributes:
        way: how keys and values are sent.
        budget: of the worker that computes prompts: a number, or ``auto``.
    """

    way: str
    budget: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A worker that listens at ``address``, and at ``ranks_port`` of ``host`` for other ranks."""

    address: str
    host: str
    ranks_port: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the driver is told.

    Attributes:
        way: the file by which workers that compute prompts send.
        seats: of those, by their token budget; of those that answer, by what is sent to them.
        most_tokens: of a sequence.
    """

    model: str
    way: str
    seats: Mapping[str, Seat]
    arms: Sequence[Arm]
    repeats: int
    most_tokens: int

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "Setup":
        """Returns what was written as JSON."""
        seats = {name: Seat(**seat) for name, seat in told["seats"].items()}
        return cls(**dict(told) | {"seats": seats, "arms": [Arm(**arm) for arm in told["arms"]]})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One transfer, as the leader that answers reports it.

    Attributes:
        first_token_s: from when its prompt was sent until the answer's first token was here, by this process's clock.
    """

    arm: Arm
    num_bytes: int
    queue_s: float
    prefill_s: float
    exposed_s: float
    first_token_s: float

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "Sample":
        """Returns what was written as JSON."""
        return cls(**dict(told) | {"arm": Arm(**told["arm"])})


def request_of(name: str, seat: Seat, setup: Setup) -> pb.LoadRequest:
    """Returns what a worker loads."""
    model = read_model_spec(read_json(Path(setup.model), "config.json", 1 << 24))
    ((part,),) = cut(model, layout("tp1"), block_size=BLOCK_SIZE, field="layout")
    shard = shard_message(0, part)
    request = pb.LoadRequest(
        epoch=seat.epoch,
        model_path=setup.model,
        dtype=pb.DTYPE_BFLOAT16,
        shard=shard,
        members=[pb.Member(host=seat.host, port=seat.ranks_port, shard=shard)],
        token=bytes(32),
        block_size=BLOCK_SIZE,
        num_blocks=2 * -(-setup.most_tokens // BLOCK_SIZE),
        token_budget=int(name) if name.isdigit() else AUTO_TOKENS,
        max_num_seqs=8,
        max_context_tokens=setup.most_tokens,
        kv_format=pb.KV_FORMAT_INT8 if name == "int8" else pb.KV_FORMAT_NATIVE,
    )
    if name == "auto":
        request.step_time_s = STEP_TIME_S
    return request


@asynccontextmanager
async def _replica(name: str, setup: Setup) -> AsyncIterator[Replica]:
    seat = setup.seats[name]
    async with connected(seat.address) as stub:
        await load(stub, request_of(name, seat, setup))
        yield Replica(name=name, epoch=seat.epoch, stub=stub, address=seat.address, services=())


async def run(setup: Setup) -> None:
    """Measures every arm in each repeat, after one that counts for nothing, and prints a line for each sample."""
    draw = random.Random(0)
    async with AsyncExitStack() as stack:
        replicas = {name: await stack.enter_async_context(_replica(name, setup)) for name in setup.seats}
        streams = {name: Stream(replicas[name]) for name in ("native", "int8")}
        for repeat in range(-1, setup.repeats):
            for arm in setup.arms:
                Path(setup.way).write_text(arm.way.removeprefix("int8 "))
                stream = streams["int8" if arm.way.startswith("int8") else "native"]
                sample = await _measure(stream, replicas[arm.budget], arm, draw)
                if repeat >= 0:
                    print(json.dumps(asdict(sample)), flush=True)
        for stream in streams.values():
            stream.close()


async def _measure(stream: Stream, source: Replica, arm: Arm, draw: random.Random) -> Sample:
    """One prompt, of tokens that nobody has keys and values of. The last of them is computed where it is answered."""
    prompt_ids = [draw.randrange(_FIRST_ID, 256) for _ in range(arm.num_tokens + 1)]
    start_s = time.monotonic()
    moved = transfer(await stream.answer(source=source, prompt_ids=prompt_ids, max_tokens=1))
    first_token_s = time.monotonic() - start_s
    assert moved is not None and not moved.problem, moved
    assert moved.num_tokens == arm.num_tokens and moved.by_layer == (arm.way != "in one piece"), moved
    return Sample(
        arm=arm,
        num_bytes=moved.num_bytes,
        queue_s=moved.queue_s,
        prefill_s=moved.prefill_s,
        exposed_s=moved.exposed_s,
        first_token_s=first_token_s,
    )


if __name__ == "__main__":
    asyncio.run(run(Setup.read(json.loads(sys.argv[1]))))
