"""Worker processes that are killed, or freeze, while keys and values are on their way between them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from placement.serving.kv.streaming import LEASE_S
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.deploying.replicas import Replica, Stream, settled, tokens, transfer
from tests.support.worker import WHOLE, have_accident, load, load_request, running

NUM_TOKENS = 8
PROMPT = [(7 * index + index * index) % 480 + 3 for index in range(200)]
OTHER = [(11 * index + index * index) % 480 + 3 for index in range(200)]
SIZES: dict[str, Any] = {"num_blocks": 32, "block_size": 16, "token_budget": 32, "max_context_tokens": 256}
# Each of the steps of a prompt takes so long that a fault meets it under way.
SLOW_STEP = "time.sleep(0.25)"


@asynccontextmanager
async def process(name: str, path: Path, epoch: int) -> AsyncIterator[tuple[Replica, int]]:
    """A replica of one rank that is a process of its own, and its pid."""
    async with running(epoch=epoch) as (worker, stub):
        members = [pb.Member(host="127.0.0.1", port=worker.ranks_port, shard=WHOLE)]
        request = load_request(path, epoch=epoch, members=members, token=bytes(32), **SIZES)
        await load(stub, request)
        yield Replica(name=name, epoch=epoch, stub=stub, address=worker.address, services=()), worker.pid


@pytest.fixture
def path(llama_checkpoint: Callable[..., Path]) -> Path:
    return llama_checkpoint(seed=5)


@asynccontextmanager
async def slow_source_and_target(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[tuple[Replica, int], tuple[Replica, int]]]:
    """A replica that computes prompts slowly, and one that answers them."""
    async with process("decode", path, 4) as target:
        have_accident(monkeypatch, "pass", always=SLOW_STEP)
        async with process("prefill", path, 3) as source:
            yield source, target


async def under_way(source: Replica) -> None:
    """Waits until some of a prompt is computed, and sent, and some is not."""
    async with asyncio.timeout(60.0):
        while (await source.load_report()).steps < 3:
            await asyncio.sleep(0.02)


async def alone(target: Replica, text: list[int]) -> list[int]:
    """What a replica answers by itself."""
    stream = Stream(target)
    try:
        return tokens(await stream.answer(prompt_ids=text, max_tokens=NUM_TOKENS, cache_salt=b"alone"))
    finally:
        stream.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_prompt_whose_source_is_gone_is_computed_here(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    async with slow_source_and_target(path, monkeypatch) as ((source, source_pid), (target, _)):
        expected = await alone(target, PROMPT)
        stream = Stream(target)
        (sequence_id,) = await stream.submit(source=source, prompt_ids=PROMPT, max_tokens=NUM_TOKENS)
        await under_way(source)
        os.kill(source_pid, number)
        try:
            outputs = (await stream.answers([sequence_id]))[sequence_id]
            assert tokens(outputs) == expected
            moved = transfer(outputs)
            assert moved is not None and moved.problem and not moved.num_tokens
            await settled(target)
        finally:
            if number is signal.SIGSTOP:
                os.kill(source_pid, signal.SIGCONT)
        if number is signal.SIGSTOP:
            await settled(source)
        stream.close()


async def test_what_a_thawed_source_writes_late_reaches_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second prompt is given the blocks of the first, whose keys and values come only then."""
    async with slow_source_and_target(path, monkeypatch) as ((source, source_pid), (target, _)):
        expected = await alone(target, OTHER)
        stream = Stream(target)
        (first,) = await stream.submit(source=source, prompt_ids=PROMPT, max_tokens=NUM_TOKENS)
        await under_way(source)
        os.kill(source_pid, signal.SIGSTOP)
        await stream.cancel(first)
        await stream.answers([first])
        await settled(target)
        (second,) = await stream.submit(prompt_ids=OTHER, max_tokens=NUM_TOKENS, cache_salt=b"second")
        os.kill(source_pid, signal.SIGCONT)
        outputs = (await stream.answers([second]))[second]
        assert tokens(outputs) == expected
        await settled(source, target)
        assert await alone(target, OTHER) == expected
        stream.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_source_whose_target_is_gone_frees_its_blocks_within_the_lease(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    async with slow_source_and_target(path, monkeypatch) as ((source, _), (target, target_pid)):
        stream = Stream(target)
        await stream.submit(source=source, prompt_ids=PROMPT, max_tokens=NUM_TOKENS)
        await under_way(source)
        os.kill(target_pid, number)
        try:
            await settled(source, timeout_s=LEASE_S + 30.0)
        finally:
            if number is signal.SIGSTOP:
                os.kill(target_pid, signal.SIGCONT)
        assert (await source.load_report()).free_blocks == SIZES["num_blocks"]
        stream.close()
