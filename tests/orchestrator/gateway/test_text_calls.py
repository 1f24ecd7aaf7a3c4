"""Tokenize and Detokenize beside Generate: bounded in number and in time, and no burden to it."""

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from orchestrator.gateway import service
from orchestrator.gateway.model import ServedModel
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.v1 import inference_pb2_grpc
from tests.support.clocks import PATIENCE_S, until
from tests.support.gateway.stub_gateway import served_model, stub_gateway

LONG = 20_000  # tokens, and characters: too many to be worked on at once


class GatedTokenizer:
    """A tokenizer whose decoding waits for ``gate``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.gate = threading.Event()
        self.num_decoding = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode_batch(self, *args: Any, **options: Any) -> Any:
        self.num_decoding += 1
        assert self.gate.wait(PATIENCE_S)
        return self._tokenizer.decode_batch(*args, **options)


@pytest.fixture
def model() -> ServedModel:
    return served_model(context=2**16)


@pytest.fixture
def tokenizer(model: ServedModel) -> Iterator[GatedTokenizer]:
    gated = GatedTokenizer(model.tokenizer)
    yield gated
    gated.gate.set()


@pytest.fixture
def gated(model: ServedModel, tokenizer: GatedTokenizer) -> ServedModel:
    return replace(model, tokenizer=tokenizer)


async def test_a_flood_of_detokenize_does_not_hold_up_a_prompt(gated: ServedModel, tokenizer: GatedTokenizer) -> None:
    async with stub_gateway(gated) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        flood = [stub.Detokenize(pb.DetokenizeRequest(ids=[1] * LONG)) for _ in range(100)]
        await until(lambda: sum(call.done() for call in flood) == 34)
        refused = [call for call in flood if call.done()]
        assert {await call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert tokenizer.num_decoding == 2, "the others wait"
        answer = stub.Generate(pb.GenerateRequest(prompt="a" * LONG))
        submit = await asyncio.wait_for(gateway.worker.submits.get(), PATIENCE_S)
        assert len(submit.prompt_ids) == LONG
        answer.cancel()
        tokenizer.gate.set()
        texts = [(await call).text for call in flood if call not in refused]
        assert texts == ["b" * LONG] * 66


async def test_a_deadline_ends_detokenize_whether_it_works_or_waits(
    gated: ServedModel, tokenizer: GatedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_CONVERSION_S", 0.2)
    async with stub_gateway(gated) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        calls = [stub.Detokenize(pb.DetokenizeRequest(ids=[1] * LONG)) for _ in range(4)]
        codes = [await asyncio.wait_for(call.code(), PATIENCE_S) for call in calls]
        assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * 4
        assert tokenizer.num_decoding == 2
        tokenizer.gate.set()


async def test_a_caller_that_leaves_frees_no_slot_while_its_thread_works(
    gated: ServedModel, tokenizer: GatedTokenizer
) -> None:
    async with stub_gateway(gated) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        calls = [stub.Detokenize(pb.DetokenizeRequest(ids=[1] * LONG)) for _ in range(2)]
        await until(lambda: tokenizer.num_decoding == 2)
        for call in calls:
            call.cancel()
        later = stub.Detokenize(pb.DetokenizeRequest(ids=[2] * LONG))
        await asyncio.wait({asyncio.ensure_future(later.code())}, timeout=0.3)
        assert tokenizer.num_decoding == 2 and not later.done()
        tokenizer.gate.set()
        assert (await later).text == "c" * LONG


async def test_texts_of_every_length_are_converted_both_ways(model: ServedModel) -> None:
    async with stub_gateway(model) as gateway, grpc.aio.insecure_channel(gateway.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        for count in (0, 1, 1024, 1025, LONG):
            assert (await stub.Detokenize(pb.DetokenizeRequest(ids=[1] * count))).text == "b" * count
            assert list((await stub.Tokenize(pb.TokenizeRequest(text="b" * count))).ids) == [1] * count
