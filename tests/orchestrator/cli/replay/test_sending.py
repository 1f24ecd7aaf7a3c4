"""Requests on their way through a gateway whose replica says what a test wants."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from google.rpc import code_pb2

from orchestrator.cli.replay.idle import idle_requests, measure_idle
from orchestrator.cli.replay.outcome import OK, STOPPED
from orchestrator.cli.replay.prompts import Prompts, make_request
from orchestrator.cli.replay.schedule import PlannedRequest, Schedule
from orchestrator.cli.replay.sending import Sender
from orchestrator.errors import ServiceError
from protos.heterodyne.worker.v1 import worker_pb2
from tests.support.clocks import PATIENCE_S, until
from tests.support.gateway.generating import LENGTH, serving, token, told
from tests.support.gateway.stub_gateway import CONTEXT, VOCAB_SIZE, StubWorker

MAKE = partial(make_request, prompts=Prompts(seed=0, vocab_size=VOCAB_SIZE), cache_salt="x")


def schedule(*lengths: tuple[int, int], due_s: Sequence[float] = ()) -> Schedule:
    """Requests with prompts and answers of these lengths, due at once or as ``due_s`` says."""
    requests = [
        PlannedRequest(
            index=i, due_s=due_s[i] if due_s else 0.0, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens
        )
        for i, (prompt_tokens, answer_tokens) in enumerate(lengths)
    ]
    return Schedule(requests=tuple(requests), num_clipped=0, shared_tokens=0)


def sender(stub: Any, what: Schedule, *, max_in_flight: int = 64, timeout_s: float = PATIENCE_S) -> Sender:
    return Sender(stub, what, MAKE, timeout_s=timeout_s, max_in_flight=max_in_flight)


def answer(worker: StubWorker, submit: worker_pb2.Submit, *, cached_tokens: int = 0) -> None:
    """The whole answer, a token in each step."""
    (fork,) = submit.forks
    for index in range(submit.max_tokens):
        end = LENGTH if index == submit.max_tokens - 1 else None
        first = {"cached_tokens": cached_tokens} if index == 0 else {}
        worker.step(token(fork, index, index % 26, end=end, **first))


async def told_of(worker: StubWorker, count: int) -> list[worker_pb2.Submit]:
    """The next requests, by the lengths of their prompts: those that are sent at once arrive in any order."""
    submits = [await told(worker) for _ in range(count)]
    return sorted(submits, key=lambda submit: len(submit.prompt_ids))


async def test_requests_are_sent_when_due_whatever_still_runs() -> None:
    async with serving() as (gateway, stub):
        sending = sender(stub, schedule((3, 2), (4, 1), (5, 3), due_s=(0.0, 0.02, 0.04)))
        running = asyncio.create_task(sending.run())
        submits = await told_of(gateway.worker, 3)
        assert [len(submit.prompt_ids) for submit in submits] == [3, 4, 5]
        assert [submit.max_tokens for submit in submits] == [2, 1, 3]
        progress = sending.progress()
        assert (progress.num_planned, progress.num_sent, progress.num_running) == (3, 3, 3)
        for submit in reversed(submits):
            answer(gateway.worker, submit, cached_tokens=len(submit.prompt_ids) - 1)
        assert await asyncio.wait_for(running, PATIENCE_S)
    outcomes = sorted(sending.outcomes, key=lambda outcome: outcome.index)
    assert [outcome.code for outcome in outcomes] == [OK] * 3
    assert [len(outcome.token_times_s) for outcome in outcomes] == [2, 1, 3]
    assert [(outcome.prompt_tokens, outcome.cached_tokens) for outcome in outcomes] == [(3, 2), (4, 3), (5, 4)]
    assert [outcome.due_s for outcome in outcomes] == [0.0, 0.02, 0.04]
    for outcome in outcomes:
        times = list(outcome.token_times_s)
        assert outcome.due_s <= outcome.sent_s <= times[0] and times == sorted(times) and times[-1] <= outcome.ended_s
    assert (sending.progress().num_completed, sending.progress().num_running) == (3, 0)


async def test_beyond_the_bound_a_request_waits_for_another_to_end() -> None:
    async with serving() as (gateway, stub):
        sending = sender(stub, schedule((3, 1), (4, 1)), max_in_flight=1)
        running = asyncio.create_task(sending.run())
        first = await told(gateway.worker)
        assert sending.progress().num_sent == 1 and gateway.worker.submits.empty()
        answer(gateway.worker, first)
        answer(gateway.worker, await told(gateway.worker))
        assert await asyncio.wait_for(running, PATIENCE_S)
    one, two = sending.outcomes
    assert (one.index, two.index) == (0, 1) and two.sent_s >= one.ended_s


async def test_an_error_counts_by_its_code_and_the_rest_goes_on() -> None:
    async with serving() as (gateway, stub):
        sending = sender(stub, schedule((3, 1), (CONTEXT + 1, 1), (4, 1)))
        running = asyncio.create_task(sending.run())
        first, second = await told_of(gateway.worker, 2)
        gateway.worker.reject(first.forks[0].sequence_id, code_pb2.RESOURCE_EXHAUSTED, "no blocks")
        answer(gateway.worker, second)
        assert await asyncio.wait_for(running, PATIENCE_S)
    refused, too_long, well = sorted(sending.outcomes, key=lambda outcome: outcome.index)
    assert refused.code == "UNAVAILABLE" and "takes no requests" in refused.detail
    assert too_long.code == "INVALID_ARGUMENT" and "context" in too_long.detail
    assert well.is_completed and sending.progress().num_failed == 2


async def test_a_request_that_takes_too_long_is_given_up() -> None:
    async with serving() as (gateway, stub):
        sending = sender(stub, schedule((3, 2)), timeout_s=0.2)
        assert await asyncio.wait_for(sending.run(), PATIENCE_S)
        await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S)
    (outcome,) = sending.outcomes
    assert outcome.code == "DEADLINE_EXCEEDED" and not outcome.is_completed


async def test_whoever_stops_it_gets_what_was_measured_and_the_replica_is_told() -> None:
    async with serving() as (gateway, stub):
        sending = sender(stub, schedule((3, 1), (4, 2), (5, 1), due_s=(0.0, 0.0, 1e6)))
        running = asyncio.create_task(sending.run())
        done, begun = await told_of(gateway.worker, 2)
        answer(gateway.worker, done)
        await until(lambda: sending.progress().num_completed == 1)
        gateway.worker.step(token(begun.forks[0], 0, 1))
        running.cancel()
        assert await asyncio.wait_for(running, PATIENCE_S) is False
        assert await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) == begun.forks[0].sequence_id
    assert [(outcome.index, outcome.code) for outcome in sending.outcomes] == [(0, OK), (1, STOPPED)]
    assert sending.progress().num_running == 0


async def test_an_idle_service_is_asked_one_request_after_the_other() -> None:
    alone = idle_requests(schedule((3, 1), (20, 1), (5, 1)), max_context_tokens=CONTEXT)
    assert [request.prompt_tokens for request in alone] == [3, 5, 20]
    async with serving() as (gateway, stub):
        measuring = asyncio.create_task(measure_idle(stub, alone, MAKE, timeout_s=PATIENCE_S))
        salts = set()
        for _ in range(2 * len(alone)):
            submit = await told(gateway.worker)
            assert gateway.worker.submits.empty()
            salts.add((len(submit.prompt_ids), submit.cache_salt))
            answer(gateway.worker, submit)
        points = await asyncio.wait_for(measuring, PATIENCE_S)
    assert len(salts) == 2 * len(alone), "no try finds what another left in the cache"
    assert [point.prompt_tokens for point in points] == [3, 5, 20]
    assert all(point.ttft_s > 0 and point.tbt_s >= 0 for point in points)


async def test_an_idle_service_that_refuses_is_an_error() -> None:
    async with serving() as (_, stub):
        request = PlannedRequest(index=0, due_s=0.0, prompt_tokens=CONTEXT + 1, answer_tokens=1)
        with pytest.raises(ServiceError, match=r"INVALID_ARGUMENT: before the replay, alone: .*context"):
            await measure_idle(stub, [request], MAKE, timeout_s=PATIENCE_S)
