"""Workers on CPUs of different kinds serve one replica: its answers are those of transformers."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.cpu.machine.target import VARIABLE, runnable_targets
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.gateway.leader_stream import submit
from tests.support.oracle import WIDE, greedy_each
from tests.support.worker import load, load_request, outputs, running

# The two least kinds, of which only one has instructions for checksums; the only one, where there is one.
TARGETS = [target.name for target in runnable_targets()[-2:]]
PROMPTS = [[i * 31 % 509 for i in range(count)] for count in (1, 12, 40)]
NUM_TOKENS = 12


def shard(rank: int) -> pb.Shard:
    """Three quarters of every layer, or the rest."""

    def span(size: int) -> pb.Range:
        return pb.Range(start=rank * size * 3 // 4, stop=size if rank else size * 3 // 4)

    return pb.Shard(rank=rank, layers={"stop": 2}, kv_heads=span(4), ffn_columns=span(512), vocab_rows=span(509))


async def answers(path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[pb.SequenceOutput]]:
    """What two workers answer to the prompts, each compiled for one of TARGETS."""
    async with AsyncExitStack() as stack:
        workers = []
        for name in (TARGETS[0], TARGETS[-1]):
            monkeypatch.setenv(VARIABLE, name)
            workers.append(await stack.enter_async_context(running()))
        members = [
            pb.Member(host="127.0.0.1", port=worker.ranks_port, shard=shard(rank))
            for rank, (worker, _) in enumerate(workers)
        ]
        requests = [
            load_request(path, dtype=dtype, shard=shard(rank), members=members, token=bytes(32), token_budget=64)
            for rank in range(2)
        ]
        stubs = [stub for _, stub in workers]
        await asyncio.gather(*(load(stub, request) for stub, request in zip(stubs, requests, strict=True)))
        call = stubs[0].Lead()
        found = []
        for number, prompt in enumerate(PROMPTS):
            await call.write(submit(number + 1, prompt_ids=prompt, max_tokens=NUM_TOKENS, prompt_logprobs=0))
            found.append(await outputs(call, number + 1))
        call.cancel()
        return found


def prompt_logprobs(answer: list[pb.SequenceOutput]) -> torch.Tensor:
    """The log-probabilities of a prompt's tokens after the first."""
    return torch.tensor([logprob for output in answer for logprob in output.prompt.logprobs])


@pytest.mark.parametrize("dtype", [pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16], ids=["float32", "bfloat16"])
async def test_ranks_of_two_kinds_answer_as_transformers(
    llama_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    path = llama_checkpoint(**WIDE)
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = await answers(path, dtype, monkeypatch)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            after = oracle(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
        expected = after[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0]
        logprobs = prompt_logprobs(answer)
        assert logprobs.shape == expected.shape
        if dtype == pb.DTYPE_FLOAT32:
            torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)
        else:
            assert (logprobs - expected).norm() <= 0.1 * expected.norm()
    if dtype == pb.DTYPE_FLOAT32:
        tokens = [[output.token_id for output in answer if output.HasField("index")] for answer in found]
        assert tokens == greedy_each(oracle, PROMPTS, NUM_TOKENS)
