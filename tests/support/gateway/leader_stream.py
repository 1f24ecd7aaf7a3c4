"""A leader stream with no connection: what a test sends comes in, and what goes out is noted as far as it is let."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.engine import Engine
from workers.sampling.grammar_compiler import GrammarCompiler
from workers.service.lead import LeaderStream
from workers.service.outbox import Outbox

EPOCH = 41
WAIT_S = 60.0


def submit(sequence_id: int = 1, *, epoch: int = EPOCH, **fields: Any) -> pb.LeadRequest:
    """One sequence, greedy, unless ``fields`` say otherwise."""
    fork = {"sequence_id": sequence_id} | {name: fields.pop(name) for name in ("prompt_logprobs",) if name in fields}
    return submit_forks(pb.Fork(**fork), epoch=epoch, **fields)


def submit_forks(*forks: pb.Fork, epoch: int = EPOCH, **fields: Any) -> pb.LeadRequest:
    """Sequences of one prompt, greedy, unless ``fields`` say otherwise."""
    base: dict[str, Any] = {
        "forks": forks,
        "prompt_ids": [3, 4, 5],
        "sampling": pb.Sampling(repetition_penalty=1.0, top_p=1.0),
        "max_tokens": 4,
    }
    return pb.LeadRequest(epoch=epoch, submit=pb.Submit(**base | fields))


def cancel(sequence_id: int) -> pb.LeadRequest:
    return pb.LeadRequest(epoch=EPOCH, cancel=pb.Cancel(sequence_id=sequence_id))


def drain() -> pb.LeadRequest:
    return pb.LeadRequest(epoch=EPOCH, drain=pb.Drain())


class Gateway:
    """The other side of a leader stream.

    Attributes:
        reads: cleared, what is written waits, as for a gateway that does not read.
        answers: the last word to each sequence, an end or a refusal.
        tokens: how many each was given.
    """

    def __init__(self, engine: Engine, grammars: GrammarCompiler, outbox: Outbox | None = None) -> None:
        self.stream = LeaderStream(engine=engine, grammars=grammars, epoch=EPOCH, outbox=outbox or Outbox())
        self.reads = asyncio.Event()
        self.reads.set()
        self.answers: dict[int, pb.End | pb.Rejected] = {}
        self.tokens: defaultdict[int, int] = defaultdict(int)
        self.load = pb.LoadReport()
        self._requests: asyncio.Queue[pb.LeadRequest | None] = asyncio.Queue()
        self._changed = asyncio.Condition()

    def send(self, *requests: pb.LeadRequest | None) -> None:
        """None closes the stream from this side."""
        for request in requests:
            self._requests.put_nowait(request)

    async def serve(self) -> None:
        """The stream, to its end."""
        await self.stream.run(self._sent(), self._write)

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until what came makes it true."""
        async with self._changed, asyncio.timeout(WAIT_S):
            await self._changed.wait_for(done)

    async def _sent(self) -> AsyncIterator[pb.LeadRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def _write(self, message: pb.LeadResponse) -> None:
        await self.reads.wait()
        assert message.epoch == EPOCH
        async with self._changed:
            self._take(message)
            self._changed.notify_all()

    def _take(self, message: pb.LeadResponse) -> None:
        match message.WhichOneof("event"):
            case "rejected":
                self._answered(message.rejected.sequence_id, message.rejected)
            case "load":
                self.load = message.load
            case "step":
                for output in message.step.sequences:
                    if output.HasField("index"):
                        assert output.index == self.tokens[output.sequence_id]
                        self.tokens[output.sequence_id] += 1
                    if output.HasField("end"):
                        self._answered(output.sequence_id, output.end)

    def _answered(self, sequence_id: int, answer: pb.End | pb.Rejected) -> None:
        assert sequence_id not in self.answers, (sequence_id, answer, self.answers[sequence_id])
        self.answers[sequence_id] = answer


@asynccontextmanager
async def leading(
    engine: Engine, grammars: GrammarCompiler, outbox: Outbox | None = None
) -> AsyncIterator[tuple[Gateway, asyncio.Task[None]]]:
    """A gateway and the stream that serves it, ended at the end."""
    gateway = Gateway(engine, grammars, outbox)
    serving = asyncio.create_task(gateway.serve())
    try:
        yield gateway, serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
