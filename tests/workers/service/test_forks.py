"""Forks: several sequences of one prompt, submitted in one message of the leader stream."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.engine import Listener, Parts, SlowRunner, engines, submission
from tests.support.gateway.leader_stream import EPOCH, WAIT_S, cancel, leading, submit_forks
from tests.support.grammars import VOCAB_SIZE, GatedFactory
from workers.sampling.grammar_compiler import GrammarCompiler
from workers.service import messages
from workers.service.outbox import Outbox

GRAMMAR = pb.Grammar(regex="[a-z]+")


@pytest.fixture
def runner() -> SlowRunner:
    return SlowRunner()


@pytest.fixture
def parts(runner: SlowRunner) -> Iterator[Parts]:
    with engines() as make:
        yield make(runner, vocab_size=VOCAB_SIZE)
        runner.gate.release(10_000)


async def entered(semaphore: Any) -> None:
    assert await asyncio.to_thread(semaphore.acquire, timeout=WAIT_S)


def forks(*sequence_ids: int, **fields: Any) -> pb.LeadRequest:
    return submit_forks(*(pb.Fork(sequence_id=i, seed=i) for i in sequence_ids), **fields)


@pytest.mark.parametrize("fields", [{}, {"grammar": GRAMMAR}])
async def test_forks_of_one_message_are_sequences_of_their_own(
    parts: Parts, runner: SlowRunner, grammars: GrammarCompiler, factory: GatedFactory, fields: dict[str, Any]
) -> None:
    factory.gate.set()
    async with leading(parts.engine, grammars) as (gateway, _):
        gateway.send(forks(1, 2, 3, max_tokens=4, **fields))
        await entered(runner.entered)
        gateway.send(cancel(2))
        await gateway.until(lambda: 2 in gateway.answers)
        cancelled = gateway.answers[2]
        assert isinstance(cancelled, pb.End) and cancelled.reason == pb.END_REASON_CANCELLED
        runner.gate.release(100)
        await gateway.until(lambda: len(gateway.answers) == 3)
        assert (gateway.tokens[1], gateway.tokens[3]) == (4, 4)
    parts.idle()


def test_forks_share_one_prompt_and_differ_in_seed_and_scores() -> None:
    message = forks(
        7, 8, prompt_ids=[3] * 100, sampling=pb.Sampling(temperature=1.0, top_p=0.5, repetition_penalty=1.0)
    )
    message.submit.forks[0].prompt_logprobs = 2
    (one, first), (two, second) = messages.submissions(message.submit, vocab_size=VOCAB_SIZE)
    assert (one, two) == (7, 8)
    assert first.prompt_ids is second.prompt_ids and first.prompt_ids == (3,) * 100
    assert (first.sampling.seed, second.sampling.seed) == (7, 8)
    assert replace(first.sampling, seed=8) == second.sampling and second.sampling.top_p == 0.5
    assert (first.prompt_logprobs, second.prompt_logprobs) == (2, None)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"epoch": EPOCH - 1}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"sampling": pb.Sampling(top_p=0.0, repetition_penalty=1.0)}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"prompt_ids": []}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"grammar": pb.Grammar()}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"grammar": pb.Grammar(regex="(")}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_refusal_names_every_fork(
    parts: Parts, grammars: GrammarCompiler, factory: GatedFactory, fields: dict[str, Any], code: grpc.StatusCode
) -> None:
    factory.gate.set()
    async with leading(parts.engine, grammars) as (gateway, _):
        gateway.send(forks(1, 2, 3, **fields))
        await gateway.until(lambda: len(gateway.answers) == 3)
        for answer in gateway.answers.values():
            assert isinstance(answer, pb.Rejected) and answer.code == code.value[0]
            assert answer.HasField("grammar_problem") == ("grammar" in fields), "the fault is the grammar's or another"
            assert answer.grammar_problem in answer.message
    parts.idle()


async def test_an_id_in_use_is_refused_and_its_siblings_go_on(
    parts: Parts, runner: SlowRunner, grammars: GrammarCompiler, factory: GatedFactory
) -> None:
    runner.gate.release(100)
    async with leading(parts.engine, grammars) as (gateway, _):
        gateway.send(forks(1, 2, grammar=GRAMMAR))
        await entered(factory.entered)
        gateway.send(forks(2, 3))
        await gateway.until(lambda: gateway.answers.keys() == {2, 3})
        refused = gateway.answers.pop(2)
        assert isinstance(refused, pb.Rejected) and "sequence_id" in refused.message
        factory.gate.set()
        await gateway.until(lambda: gateway.answers.keys() == {1, 2, 3})
        assert gateway.tokens == {1: 4, 2: 4, 3: 4}
    parts.idle()


async def test_a_gateway_that_reads_no_refusals_leaves_nothing_to_be_computed(
    parts: Parts, runner: SlowRunner, grammars: GrammarCompiler, factory: GatedFactory
) -> None:
    async with leading(parts.engine, grammars, Outbox(max_messages=2)) as (gateway, serving):
        await gateway.until(lambda: gateway.load.total_blocks > 0)
        gateway.reads.clear()
        gateway.send(forks(*range(8), grammar=GRAMMAR))
        await entered(factory.entered)
        gateway.send(forks(*range(9)))  # the last of them would be taken, were the stream still there
        await asyncio.wait_for(serving, WAIT_S)
        assert gateway.stream.status is not None
        assert gateway.stream.status[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    factory.gate.set()
    runner.gate.release(100)
    other = Listener()
    parts.engine.submit(other, 1, submission([3, 4], max_tokens=1))
    await asyncio.to_thread(other.wait_ends, 1)
    parts.idle()
    assert parts.engine.load.output_tokens == 1, "the other's"


async def test_a_submission_of_nothing_ends_the_stream(parts: Parts, grammars: GrammarCompiler) -> None:
    async with leading(parts.engine, grammars) as (gateway, serving):
        gateway.send(forks())
        await asyncio.wait_for(serving, WAIT_S)
        assert gateway.stream.status == (grpc.StatusCode.INVALID_ARGUMENT, "a Submit holds no fork")
    parts.idle()
