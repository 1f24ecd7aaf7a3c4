"""Clients that read late, slowly or never, and tokens that come faster than they can be sent."""

import asyncio

import grpc
import pytest

from orchestrator.gateway import generate
from orchestrator.gateway.fleet import inbox
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.v1 import inference_pb2_grpc
from tests.support.clocks import PATIENCE_S, until
from tests.support.gateway.generating import LENGTH, STOP, ask, collect, serving, submitted, token


async def test_a_client_that_never_reads_loses_its_slot_soon_after_its_time() -> None:
    async with serving(request_timeout_s=0.5, context=2**20) as (gateway, _):
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
            # Far more than the windows of the connection hold.
            ids = {"ids": [1] * 500_000}
            request = pb.GenerateRequest(prompt_ids=ids, echo=True)
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
            (fork,) = await submitted(gateway.worker)
            assert await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) == fork.sequence_id
            await until(lambda: gateway.admission.in_flight == 0)
            call.cancel()


async def test_a_client_that_does_not_read_is_given_up_long_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MAX_WAITING", 100)
    async with serving(context=2**20) as (gateway, _):
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
            # The echo alone is more than the windows of the connection hold; what follows can but wait.
            request = pb.GenerateRequest(prompt_ids={"ids": [1] * 500_000}, echo=True)
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request)
            (fork,) = await submitted(gateway.worker)
            for index in range(101):
                gateway.worker.step(token(fork, index, 3))
            assert await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S) == fork.sequence_id
            await until(lambda: gateway.admission.in_flight == 0)
            call.cancel()


async def test_a_client_that_is_slow_to_read_has_until_its_deadline_for_the_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generate, "_LAST_WORD_S", 0.2)
    async with serving(context=2**20) as (gateway, _):
        options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(gateway.address, options=options) as channel:
            request = pb.GenerateRequest(prompt_ids={"ids": [1] * 300_000}, echo=True)
            call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=PATIENCE_S)
            (fork,) = await submitted(gateway.worker)
            gateway.worker.step(token(fork, 0, 3, end=STOP))
            await asyncio.sleep(0.7)  # longer than others have
            responses, code = await collect(call)
            assert code is grpc.StatusCode.OK and responses[-1].HasField("finished")


async def test_tokens_that_come_faster_than_they_can_be_sent_are_sent_together_and_none_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Steps come far apart here where the machine is busy; the pause after a round is made longer than that.
    monkeypatch.setattr(inbox, "_PAUSE", 100.0)
    monkeypatch.setattr(inbox, "_MOST_PAUSE_S", 0.5)
    async with serving(context=2**16) as (gateway, stub):
        num_streams, num_steps = 16, 400
        answers = [ask(stub, max_tokens=num_steps) for _ in range(num_streams)]
        forks = await submitted(gateway.worker, num_streams)
        for index in range(num_steps):
            end = LENGTH if index == num_steps - 1 else None
            gateway.worker.step(*(token(fork, index, index % 26, end=end) for fork in forks))
        for answer in answers:
            responses, code = await answer
            assert code is grpc.StatusCode.OK
            ids = [item.id for response in responses for item in response.chunk.tokens]
            assert ids == [index % 26 for index in range(num_steps)]
            # Without rounds nothing is sent together.
            assert len(responses) < 0.5 * num_steps
