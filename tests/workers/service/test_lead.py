"""The leader stream between a gateway and the engine: nothing is overtaken, nothing piles up, all is answered."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc
from tests.support.engine import Listener, Parts, SlowRunner, engines, submission
from tests.support.gateway.leader_stream import EPOCH, WAIT_S, cancel, drain, leading, submit
from tests.support.grammars import VOCAB_SIZE, GatedFactory
from tests.support.worker import connected, status_of
from workers.engine.engine import Engine
from workers.host.device import open_device
from workers.sampling.grammar import GrammarFactory
from workers.sampling.grammar_compiler import GrammarCompiler
from workers.service.outbox import Outbox
from workers.service.server import WorkerService
from workers.startup.loading import Loaded
from workers.step.types import Batch, StepResult

GRAMMAR = pb.Grammar(regex="[a-z]+")
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Parts]]:
    with engines() as make:
        yield make


@pytest.fixture
def runner() -> SlowRunner:
    return SlowRunner()


@pytest.fixture
def parts(make_engine: Callable[..., Parts], runner: SlowRunner) -> Iterator[Parts]:
    yield make_engine(runner, vocab_size=VOCAB_SIZE)
    runner.gate.release(10_000)


async def entered(semaphore: Any) -> None:
    assert await asyncio.to_thread(semaphore.acquire, timeout=WAIT_S)


# -- a gateway that does not read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [{"max_messages": 16}, {"max_bytes": 600}])
async def test_a_gateway_that_does_not_read_loses_its_sequences_and_its_stream(
    parts: Parts, runner: SlowRunner, grammars: GrammarCompiler, bounds: dict[str, int]
) -> None:
    stays = Listener()
    parts.engine.submit(stays, 1, submission([3, 4], max_tokens=300))
    async with leading(parts.engine, grammars, Outbox(**bounds)) as (gateway, serving):
        await gateway.until(lambda: gateway.load.total_blocks > 0)
        gateway.reads.clear()
        gateway.send(submit(1, max_tokens=400), submit(2, max_tokens=400), submit(3, max_tokens=9, grammar=GRAMMAR))
        runner.gate.release(1000)
        await asyncio.wait_for(serving, WAIT_S)
        assert gateway.stream.status is not None
        assert gateway.stream.status[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "does not read" in gateway.stream.status[1]
    await asyncio.to_thread(stays.wait_ends, 1)
    assert stays.tokens[1] == [1] * 300, "others go on"
    parts.idle()


async def test_a_gateway_that_reads_slowly_gets_everything(
    parts: Parts, runner: SlowRunner, grammars: GrammarCompiler
) -> None:
    async with leading(parts.engine, grammars) as (gateway, _):
        gateway.reads.clear()
        gateway.send(submit(1, max_tokens=300), submit(2, max_tokens=200))
        runner.gate.release(1000)
        while parts.engine.load.output_tokens < 500:
            await asyncio.sleep(0.01)
        gateway.reads.set()
        await gateway.until(lambda: len(gateway.answers) == 2)
        assert gateway.tokens == {1: 300, 2: 200}
    parts.idle()


# -- the worker stops -------------------------------------------------------------------------------------------------


async def test_when_the_worker_stops_everything_is_answered_once_and_the_stream_ends(
    parts: Parts, runner: SlowRunner, grammars: GrammarCompiler, factory: GatedFactory
) -> None:
    """One sequence runs in a step that hangs, one has come since, and one waits for its grammar."""
    async with leading(parts.engine, grammars) as (gateway, serving):
        gateway.send(submit(1, max_tokens=100))
        await entered(runner.entered)
        gateway.send(submit(2), submit(3, grammar=GRAMMAR))
        await entered(factory.entered)
        parts.engine.stop()
        await asyncio.wait_for(serving, WAIT_S)
        assert gateway.stream.status == (grpc.StatusCode.UNAVAILABLE, "this worker stops")
        assert gateway.answers.keys() == {1, 2, 3}
        for sequence_id, answer in gateway.answers.items():
            if isinstance(answer, pb.Rejected):
                assert answer.code == UNAVAILABLE and sequence_id != 1
            else:
                assert (answer.reason, answer.detail) == (pb.END_REASON_FAILED, "Stopping: this worker stops")


async def test_a_stream_that_begins_after_the_stop_ends_at_once(parts: Parts, grammars: GrammarCompiler) -> None:
    parts.idle()
    async with leading(parts.engine, grammars) as (gateway, serving):
        await asyncio.wait_for(serving, WAIT_S)
        assert gateway.stream.status == (grpc.StatusCode.UNAVAILABLE, "this worker stops")


async def test_a_worker_that_stops_because_it_lost_another_says_so(parts: Parts, grammars: GrammarCompiler) -> None:
    async with leading(parts.engine, grammars) as (gateway, serving):
        parts.engine.stop("lost rank 1: is frozen or cut off")
        parts.engine.stop()  # again, as it is at the end
        await asyncio.wait_for(serving, WAIT_S)
        assert gateway.stream.status == (grpc.StatusCode.UNAVAILABLE, "lost rank 1: is frozen or cut off")


class Stuck(SlowRunner):
    """Never gets a step put together, until its gate is open."""

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT_S)
        return super().prepare(batch)


class LoadedService(WorkerService):
    """A worker that has loaded already."""

    def __init__(self, engine: Engine, grammars: GrammarFactory) -> None:
        super().__init__(device=open_device("cpu", 1), epoch=EPOCH)
        self._loaded = Loaded(engine=engine, grammars=grammars, weight_bytes=0, kv_bytes=0)


async def test_a_stream_ends_in_time_even_where_the_engine_itself_is_stuck(
    make_engine: Callable[..., Parts], factory: GatedFactory
) -> None:
    runner = Stuck()
    parts = make_engine(runner, vocab_size=VOCAB_SIZE)
    service, server = LoadedService(parts.engine, factory), grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with connected(address) as stub:
        call = stub.Lead()
        await call.write(submit(1))
        await entered(runner.entered)
        await service.stop(0.1)
        assert not parts.engine.ended.done()
        status = await status_of(call)
        assert (status.code(), status.details()) == (grpc.StatusCode.UNAVAILABLE, "this worker stops")
    await server.stop(0.0)
    runner.gate.release(10)
    service.close()
    parts.idle()


# -- grammars that are still compiled ---------------------------------------------------------------------------------


async def test_a_drain_does_not_overtake_a_sequence_whose_grammar_is_compiled(
    parts: Parts, runner: SlowRunner, grammars: GrammarCompiler, factory: GatedFactory
) -> None:
    runner.gate.release(100)
    async with leading(parts.engine, grammars) as (gateway, _), leading(parts.engine, grammars) as (other, _):
        other.send(submit(1, grammar=GRAMMAR))
        gateway.send(submit(1, grammar=GRAMMAR), submit(2, grammar=pb.Grammar(regex="(")))
        await entered(factory.entered)
        await entered(factory.entered)
        gateway.send(drain(), submit(3), submit(4, grammar=GRAMMAR))
        await gateway.until(lambda: len(gateway.answers) == 2)
        other.send(submit(5))
        await other.until(lambda: 5 in other.answers)
        for answer in (gateway.answers[3], gateway.answers[4], other.answers[5]):
            assert isinstance(answer, pb.Rejected) and answer.code == UNAVAILABLE
        factory.gate.set()
        await gateway.until(lambda: len(gateway.answers) == 4)
        await other.until(lambda: len(other.answers) == 2)
        for asked in (gateway, other):
            assert asked.tokens == {1: 4}
            answer = asked.answers[1]
            assert isinstance(answer, pb.End) and answer.reason == pb.END_REASON_LENGTH
        refused = gateway.answers[2]
        assert isinstance(refused, pb.Rejected) and refused.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    parts.idle()


async def test_a_sequence_cancelled_while_its_grammar_is_compiled_ends_as_cancelled(
    parts: Parts, runner: SlowRunner, grammars: GrammarCompiler, factory: GatedFactory
) -> None:
    runner.gate.release(100)
    async with leading(parts.engine, grammars) as (gateway, _):
        gateway.send(submit(1, grammar=GRAMMAR), submit(2, grammar=GRAMMAR))
        await entered(factory.entered)
        gateway.send(cancel(1))
        await gateway.until(lambda: 1 in gateway.answers)
        answer = gateway.answers[1]
        assert isinstance(answer, pb.End) and answer.reason == pb.END_REASON_CANCELLED
        factory.gate.set()
        await gateway.until(lambda: 2 in gateway.answers)
        assert gateway.tokens == {2: 4} and len(factory.calls) == 1
    parts.idle()


async def test_a_sequence_id_whose_grammar_is_compiled_is_in_use(
    parts: Parts, runner: SlowRunner, grammars: GrammarCompiler, factory: GatedFactory
) -> None:
    runner.gate.release(100)
    async with leading(parts.engine, grammars) as (gateway, _):
        gateway.send(submit(1, grammar=GRAMMAR))
        await entered(factory.entered)
        gateway.send(submit(1, grammar=GRAMMAR))
        await gateway.until(lambda: 1 in gateway.answers)
        refused = gateway.answers.pop(1)
        assert isinstance(refused, pb.Rejected) and "sequence_id" in refused.message
        factory.gate.set()
        await gateway.until(lambda: 1 in gateway.answers)
        assert gateway.tokens == {1: 4}
    parts.idle()


async def test_a_gateway_that_goes_takes_along_what_is_compiled_for_it(
    parts: Parts, grammars: GrammarCompiler, factory: GatedFactory
) -> None:
    async with leading(parts.engine, grammars) as (gateway, serving):
        gateway.send(submit(1, grammar=GRAMMAR))
        await entered(factory.entered)
        gateway.send(None)
        await asyncio.wait_for(serving, WAIT_S)
        assert gateway.stream.status is None
    factory.gate.set()
    assert not gateway.answers
    parts.idle()
    assert parts.engine.load.steps == 0
