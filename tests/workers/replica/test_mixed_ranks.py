"""Worker processes that join each other: of different targets they serve together, and otherwise they must be alike."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kernels.cpu.machine.target import runnable_targets
from placement.measured.targets import TARGET_VARIABLE
from protos.codec.version import VERSION
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.gateway.leader_stream import EPOCH, submit
from tests.support.worker import have_accident, load, load_request, outputs, running

LOAD_S = 120.0
NUM_TOKENS = 12


def half(rank: int) -> pb.Shard:
    """A half of every layer."""

    def span(size: int) -> pb.Range:
        return pb.Range(start=rank * size // 2, stop=(rank + 1) * size // 2)

    return pb.Shard(rank=rank, layers={"stop": 2}, kv_heads=span(2), ffn_columns=span(96), vocab_rows=span(509))


@asynccontextmanager
async def pair(monkeypatch: pytest.MonkeyPatch, second: str = "") -> AsyncIterator[tuple[list[Any], list[pb.Member]]]:
    """Two workers, of which the second has the target ``second``: their stubs, and what each is told of both."""
    async with running() as (one, one_stub):
        monkeypatch.setenv(TARGET_VARIABLE, second)
        async with running() as (other, other_stub):
            monkeypatch.delenv(TARGET_VARIABLE)
            members = [
                pb.Member(host="127.0.0.1", port=worker.ranks_port, shard=half(rank))
                for rank, worker in enumerate((one, other))
            ]
            yield [one_stub, other_stub], members


@pytest.mark.parametrize(
    "lesser", sorted({target.name for target in (runnable_targets()[1:2] + runnable_targets()[-1:])})
)
async def test_ranks_of_different_targets_answer_as_one_rank_does(
    llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, lesser: str
) -> None:
    path = llama_checkpoint()
    async with running() as (_, alone):
        await load(alone, load_request(path))
        expected = await answer(alone)
    async with pair(monkeypatch, lesser) as (stubs, members):
        described = [await stub.Describe(pb.DescribeRequest(epoch=EPOCH)) for stub in stubs]
        assert [each.target for each in described] == [runnable_targets()[0].name, lesser]
        assert not await load_both(path, stubs, members, [{"token_budget": 64}] * 2)  # so that steps overlap
        assert await answer(stubs[0]) == expected


async def test_ranks_of_different_targets_serve_together_in_bfloat16(
    llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their products differ in the last bits, and so may their answers; they go on all the same."""
    path = llama_checkpoint()
    fields = {"dtype": pb.DTYPE_BFLOAT16, "token_budget": 64}
    async with pair(monkeypatch, runnable_targets()[-1].name) as (stubs, members):
        assert not await load_both(path, stubs, members, [fields] * 2)
        first = await answer(stubs[0])
        assert len(first) == NUM_TOKENS and await answer(stubs[0]) == first


async def answer(stub: Any) -> list[int]:
    """The tokens that follow a prompt."""
    call = stub.Lead()
    await call.write(submit(max_tokens=NUM_TOKENS, prompt_ids=list(range(3, 40))))
    return [output.token_id for output in await outputs(call, 1)]


@pytest.mark.parametrize(
    ("fields", "name", "problem"),
    [
        ({"dtype": pb.DTYPE_BFLOAT16}, "dtype", "rank 1 has dtype bfloat16, rank 0 has float32"),
        ({"num_blocks": 65}, "limits", "num_blocks 65"),
        ({"token_budget": 31}, "limits", "token_budget 31"),
        ({"facts": pb.ModelFacts(eos_token_ids=[7])}, "model", "rank 1 has a model with the digest"),
    ],
)
async def test_every_rank_of_unequal_ones_says_in_which_they_differ(
    llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], name: str, problem: str
) -> None:
    async with pair(monkeypatch) as (stubs, members):
        errors = await load_both(llama_checkpoint(), stubs, members, [{}, fields])
    check_refused(errors, name, problem)


async def test_ranks_of_different_versions_are_told_to_install_the_same(
    llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama_checkpoint()
    async with running() as (one, one_stub):
        have_accident(monkeypatch, "pass", more="from workers.startup import facts; facts.VERSION = '0.0.9'")
        async with running() as (other, other_stub):
            members = [
                pb.Member(host="127.0.0.1", port=worker.ranks_port, shard=half(rank))
                for rank, worker in enumerate((one, other))
            ]
            errors = await load_both(path, [one_stub, other_stub], members, [{}, {}])
    problem = f"rank 1 has version 0.0.9 of heterodyne, rank 0 has {VERSION}. Install the same version on all machines."
    check_refused(errors, "version", problem)


async def load_both(
    path: Any, stubs: list[Any], members: list[pb.Member], fields: list[dict[str, Any]]
) -> list[grpc.aio.AioRpcError]:
    """Loads both ranks, and returns the errors of those that refuse."""
    requests = [
        load_request(path, **{"members": members, "token": bytes(32), "shard": half(rank)} | own)
        for rank, own in enumerate(fields)
    ]
    loads = (load(stub, request) for stub, request in zip(stubs, requests, strict=True))
    results = await asyncio.wait_for(asyncio.gather(*loads, return_exceptions=True), LOAD_S)
    errors = [result for result in results if isinstance(result, BaseException)]
    assert all(isinstance(error, grpc.aio.AioRpcError) for error in errors), errors
    return [error for error in errors if isinstance(error, grpc.aio.AioRpcError)]


def check_refused(errors: list[grpc.aio.AioRpcError], name: str, problem: str) -> None:
    """Both ranks refuse; one that hears of the other's refusal first tells it in the other's words."""
    assert len(errors) == 2
    for error in errors:
        details = error.details() or ""
        assert f"{name}: rank 1 has " in details and problem in details, details
    assert errors[0].code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE)
