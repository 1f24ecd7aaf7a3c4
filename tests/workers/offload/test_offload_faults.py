"""Attention workers and model workers that are lost while sequences run, and others in their places."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from placement.planning.residency import Partition
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.deploying.answers import check_equal, expected, prompt
from tests.support.deploying.offloaded import SECRET, SIZES, Box, boxes, group_checkpoint, offloaded
from tests.support.deploying.replicas import Replica, Stream, settled
from tests.support.worker import running

NUM_TOKENS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """An attention worker that is a process of its own."""

    pid: int
    port: int

    @property
    def message(self) -> pb.AttentionWorker:
        """What model ranks are told of it."""
        return pb.AttentionWorker(host="127.0.0.1", port=self.port, name="box")


@asynccontextmanager
async def process(epoch: int) -> AsyncIterator[Process]:
    """An attention worker that is a process of its own."""
    async with running(epoch=epoch) as (worker, stub):
        load = pb.AttentionLoad(kv_cache_bytes=64 << 20, secret=SECRET)
        async for _ in stub.Load(pb.LoadRequest(epoch=epoch, attention=load), timeout=60):
            pass
        yield Process(pid=worker.pid, port=worker.ranks_port)


async def begun(replica: Replica, num_tokens: int) -> None:
    """Waits until answers are under way."""
    async with asyncio.timeout(60.0):
        while (await replica.load_report()).output_tokens < num_tokens:
            await asyncio.sleep(0.005)


@pytest.fixture
def path(checkpoint: Callable[..., Path]) -> Path:
    return group_checkpoint(checkpoint, 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_keys_and_values_of_a_lost_attention_worker_are_computed_again(
    path: Path, number: signal.Signals
) -> None:
    """Prompts and the tokens that were emitted are computed anew; clients see each token once."""
    texts = [prompt(70), prompt(33, 40)]
    wanted = [expected(path, text, NUM_TOKENS) for text in texts]
    async with process(5) as lost, process(6) as other, process(7) as spare:
        workers: list[Any] = [lost, other]
        async with offloaded(path, workers, Partition.KV_HEADS, **SIZES) as found:
            stream = Stream(found)
            ids = [(await stream.submit(prompt_ids=text, max_tokens=NUM_TOKENS, logprobs=0))[0] for text in texts]
            await begun(found, 10)
            os.kill(lost.pid, number)
            try:
                move = pb.MoveAttentionRequest(epoch=found.epoch, worker=0, address=spare.message)
                await found.stub.MoveAttention(move)
                answers = await stream.answers(ids)
                for sequence_id, answer in zip(ids, wanted, strict=True):
                    check_equal(answers[sequence_id], answer)
                    assert [it.index for it in answers[sequence_id] if it.HasField("index")] == list(range(NUM_TOKENS))
            finally:
                if number is signal.SIGSTOP:
                    os.kill(lost.pid, signal.SIGCONT)
            await settled(found)
            stream.close()


@pytest.mark.parametrize("partition", Partition)
async def test_a_model_worker_is_replaced_and_nothing_that_attention_workers_hold_is_lost(
    path: Path, partition: Partition
) -> None:
    text = prompt(150)
    wanted = expected(path, text, NUM_TOKENS)
    async with boxes(2) as workers:
        emitted = await _leave(path, workers, partition, text)
        again = [*text, *wanted[0][:emitted]]
        async with offloaded(path, workers, partition, epoch=42, resumes=True, **SIZES) as found:
            stream = Stream(found)
            outputs = await stream.answer(prompt_ids=again, max_tokens=NUM_TOKENS - emitted, logprobs=0)
            check_equal(outputs, (wanted[0][emitted:], wanted[1][emitted:]))
            cached = next(output.cached_tokens for output in outputs if output.HasField("cached_tokens"))
            # All but the last block, which is not full, and the one that the last step was to name.
            assert cached >= len(again) - 3 * 8, "what was computed is found again"
            stream.close()
            await settled(found)


async def _leave(path: Path, workers: list[Box], partition: Partition, text: list[int]) -> int:
    """Has a replica begin an answer, and end; returns how many tokens there were for certain."""
    async with offloaded(path, workers, partition, epoch=41, **SIZES) as found:
        stream = Stream(found)
        await stream.submit(prompt_ids=text, max_tokens=NUM_TOKENS)
        await begun(found, 40)
        stream.close()
    return 32


async def test_a_greater_epoch_that_does_not_resume_starts_with_nothing(path: Path) -> None:
    text = prompt(150)
    wanted = expected(path, text, 4)
    async with boxes(1) as workers:
        await _leave(path, workers, Partition.KV_HEADS, text)
        async with offloaded(path, workers, Partition.KV_HEADS, epoch=42, **SIZES) as found:
            stream = Stream(found)
            outputs = await stream.answer(prompt_ids=text, max_tokens=4, logprobs=0)
            check_equal(outputs, wanted)
            assert next(it.cached_tokens for it in outputs if it.HasField("cached_tokens")) == 0
            stream.close()
