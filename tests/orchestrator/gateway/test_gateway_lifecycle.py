"""The gateway over real worker processes: time limits, cancels, losses and stops, and that nothing is left behind."""

import asyncio
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.codec.log_record import record_of
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.clocks import PATIENCE_S, own_time, until
from tests.support.deploying.deployment import Deployment, deploy, make_config, settled
from tests.support.gateway.answers import answer, check_order, details, request
from tests.support.tokenizer import save_tokenizer

# One deployment serves most of the tests, so they share its event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


NUM_SLOW = 200  # tokens, of the slow model: seconds
SILENCE = ("heartbeat", "ping timeout")  # whichever the frozen process misses first


async def test_a_deadline_ends_the_request_and_frees_its_blocks(stub: Any, deployment: Deployment) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request(max_tokens=500), timeout=0.05):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await settled(deployment, timeout_s=PATIENCE_S)


async def test_the_services_own_time_limit_has_a_terminal_message(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint, gateway={"request_timeout_s": 0.05})
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        responses = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in inference_pb2_grpc.InferenceStub(channel).Generate(request(max_tokens=500)):
                responses.append(response)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        check_order(responses)
        assert responses[-1].finished.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        await settled(running, timeout_s=PATIENCE_S)


async def test_cancel_reaches_the_engine_and_leaves_no_task(stub: Any, deployment: Deployment) -> None:
    await answer(stub, request())
    before = len(asyncio.all_tasks())
    for _ in range(20):
        call = stub.Generate(request(max_tokens=400))
        await call.read()
        call.cancel()
    await settled(deployment, timeout_s=PATIENCE_S)
    await until(lambda: len(asyncio.all_tasks()) <= before)


async def test_more_than_the_queue_holds_is_refused_with_a_retry_hint(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint, gateway={"max_in_flight": 2, "max_queued": 2})
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        async with running.gateway.admission.slot(weight=2):  # two that take as long as it takes
            asked = [asyncio.create_task(answer(stub, request(max_tokens=20))) for _ in range(10)]
            await until(lambda: sum(task.done() for task in asked) == 8)
            assert running.gateway.admission.queued == 2
        results = await asyncio.gather(*asked, return_exceptions=True)
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert len(refused) == 8
        for error in refused:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details(error, error_details_pb2.RetryInfo).retry_delay.seconds >= 1
        for result in results:
            if not isinstance(result, BaseException):
                check_order(result)
        await settled(running, timeout_s=PATIENCE_S)


async def test_health_and_reflection_tell_what_is_there(deployment: Deployment) -> None:
    async with grpc.aio.insecure_channel(deployment.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "heterodyne.v1.Inference", "heterodyne.v1.Admin"):
            state = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert state.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask])):
            names = {service.name for service in reply.list_services_response.service}
        assert {"heterodyne.v1.Inference", "heterodyne.v1.Admin", "grpc.health.v1.Health"} <= names


async def watch_until(channel: grpc.aio.Channel, wanted: int) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="heterodyne.v1.Inference"), timeout=PATIENCE_S
    )
    async for state in watch:
        if state.status == wanted:
            watch.cancel()
            return
    raise AssertionError("the watch ended")


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, ("SIGKILL",)), (signal.SIGSTOP, SILENCE)])
async def test_a_lost_worker_ends_its_requests_within_3_s_and_the_other_replica_goes_on(
    slow_checkpoint: Path, tmp_path: Path, number: signal.Signals, words: tuple[str, ...]
) -> None:
    config = make_config(tmp_path, slow_checkpoint, cluster={"workers": [{"device": "cpu", "count": 2}]})
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel, own_time() as clock:
        stub = inference_pb2_grpc.InferenceStub(channel)
        lost_at = [0.0]

        async def one(index: int) -> tuple[str, float, list[pb.GenerateResponse]]:
            message = request(max_tokens=NUM_SLOW, request_id=f"request {index}")
            code, responses = await outcome(stub.Generate(message, timeout=PATIENCE_S))
            return code, clock.now_s - lost_at[0], responses

        streams = [asyncio.create_task(one(index)) for index in range(16)]
        while len(begun(running, "replica-1")) < 4:
            await asyncio.sleep(0)
        lost_at[0] = clock.now_s
        os.kill(running.pid("replica-1"), number)
        elsewhere = begun(running, "replica-0")
        results = await asyncio.gather(*streams)
        failed = [result for result in results if result[0] != "OK"]
        assert len(failed) >= 4
        for code, after_s, responses in failed:
            assert code == "UNAVAILABLE"
            assert after_s < 3.0
            check_order(responses)
            assert responses[-1].finished.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert responses[0].accepted.request_id not in elsewhere
        for code, _, responses in results:
            if code == "OK":
                check_order(responses)
                assert responses[-1].finished.replica == "replica-0"
        assert any(result[0] == "OK" for result in results)
        check_order(await answer(stub, request()))
        status = await lost_status(channel)
        assert any(word in status.cause for word in words), status.cause
        await settled(running, timeout_s=PATIENCE_S)


record_of_gateway = partial(record_of, source="gateway")


async def outcome(call: Any) -> tuple[str, list[pb.GenerateResponse]]:
    """How the call ended, and all that it said."""
    responses = []
    try:
        async for response in call:
            responses.append(response)
    except grpc.aio.AioRpcError as error:
        return error.code().name, responses
    return "OK", responses


def begun(running: Deployment, replica: str) -> set[str]:
    """The requests of a replica that have tokens and are not finished, as the gateway knows at this moment."""
    (epoch,) = [known.epoch for known in running.gateway.fleet.deployment.replicas if known.name == replica]
    return {
        entry.request_id for entry in running.gateway.generator.journal.on_replica(replica, epoch) if entry.emitted_ids
    }


async def lost_status(channel: grpc.aio.Channel) -> admin_pb2.ReplicaStatus:
    """The status of replica-1 once the controller has said what became of it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status = await admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest())
            healthy, lost = status.replicas
            assert healthy.state == admin_pb2.REPLICA_STATE_READY
            if lost.state == admin_pb2.REPLICA_STATE_FAILED and lost.ranks[0].cause:
                return lost
            await asyncio.sleep(0.05)


async def test_the_last_replica_lost_means_not_serving_and_unavailable_at_once(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, served_checkpoint)
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        os.kill(running.pid("replica-0"), signal.SIGKILL)
        await watch_until(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(inference_pb2_grpc.InferenceStub(channel), request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "replica-0 failed: " in caught.value.details()
        assert sum(running.gateway.fleet.losses.values()) == 1


async def test_drain_refuses_new_requests_and_finishes_those_in_flight(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint)
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        # A slot of the test's own keeps the service up until all was seen.
        async with running.gateway.admission.slot():
            streams = [aiter(stub.Generate(request(max_tokens=300), timeout=PATIENCE_S)) for _ in range(8)]
            begun = [await anext(stream) for stream in streams]
            drain = asyncio.create_task(running.gateway.drain())
            await watch_until(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer(stub, request())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        for first, stream in zip(begun, streams, strict=True):
            responses = [first, *[response async for response in stream]]
            check_order(responses)
            assert responses[-1].finished.finish_reason == pb.FINISH_REASON_LENGTH
        assert await drain


async def test_a_lost_controller_does_not_stop_serving(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint)
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        await running.control.stop(0.0)
        stub = inference_pb2_grpc.InferenceStub(channel)
        async with asyncio.timeout(PATIENCE_S):
            while (
                await admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest())
            ).gateway.controller_connected:
                await asyncio.sleep(0.05)
        check_order(await answer(stub, request()))
        os.kill(running.pid("replica-0"), signal.SIGKILL)
        await watch_until(channel, health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_a_cut_drain_ends_every_answer_with_its_last_message(slow_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, slow_checkpoint, gateway={"drain_grace_s": 0.1, "max_in_flight": 4})
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        def ask() -> "asyncio.Task[tuple[str, list[pb.GenerateResponse]]]":
            return asyncio.create_task(outcome(stub.Generate(request(max_tokens=NUM_SLOW), timeout=PATIENCE_S)))

        streams = [ask() for _ in range(4)]
        while len(begun(running, "replica-0")) < 4:
            await asyncio.sleep(0)
        os.kill(running.pid("replica-0"), signal.SIGSTOP)  # so that it cannot finish by itself
        streams += [ask() for _ in range(4)]
        await until(lambda: running.gateway.admission.queued == 4)
        assert not await running.gateway.drain()
        for code, responses in await asyncio.gather(*streams):
            assert code == "UNAVAILABLE"
            if responses:
                check_order(responses)
                assert responses[-1].finished.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
                assert "the service was stopped" in responses[-1].finished.error.message
        assert not running.gateway.fleet.losses, "a stop is no loss"
        os.kill(running.pid("replica-0"), signal.SIGCONT)


async def test_a_client_that_stops_reading_loses_its_slot_at_its_deadline(stub: Any, deployment: Deployment) -> None:
    # Never read: the service's writes block once the window is full, or end with the request.
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(deployment.address, options=options) as channel:
        deaf = inference_pb2_grpc.InferenceStub(channel)
        calls = [deaf.Generate(request(max_tokens=450, logprobs=20), timeout=1.5) for _ in range(4)]
        await asyncio.sleep(0.2)
        check_order(await answer(stub, request()))
        await settled(deployment, timeout_s=PATIENCE_S)
        for call in calls:
            call.cancel()


async def test_tokenizing_a_long_text_does_not_hold_the_service_up(tmp_path: Path, llama_checkpoint: Any) -> None:
    model = llama_checkpoint(seed=3, max_position_embeddings=131072)
    save_tokenizer(model)
    async with deploy(make_config(tmp_path, model)) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        limit = (await stub.GetModel(pb.GetModelRequest())).model.max_context_tokens
        text = "waters of the deep " * (limit // 4)
        health = health_pb2_grpc.HealthStub(channel)
        num_answered = 0
        tokenizing = asyncio.ensure_future(stub.Tokenize(pb.TokenizeRequest(text=text), timeout=PATIENCE_S))
        while not tokenizing.done():
            await health.Check(health_pb2.HealthCheckRequest())
            num_answered += 1
        assert len(tokenizing.result().ids) > 1000
        # Were the loop held, at most the one on its way before and the one after.
        assert num_answered > 10


async def test_a_second_request_to_stop_cuts_the_grace_period(
    slow_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, slow_checkpoint, gateway={"drain_grace_s": 60.0})
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        stream = asyncio.create_task(outcome(stub.Generate(request(max_tokens=NUM_SLOW), timeout=PATIENCE_S)))
        while not begun(running, "replica-0"):
            await asyncio.sleep(0)
        os.kill(running.pid("replica-0"), signal.SIGSTOP)  # so that it cannot finish by itself
        cut = asyncio.Event()
        drain = asyncio.create_task(running.gateway.drain(cut))
        await asyncio.sleep(0.1)
        assert not drain.done()
        cut.set()
        async with asyncio.timeout(50.0):  # within the grace period
            assert not await drain
        code, responses = await stream
        assert code == "UNAVAILABLE"
        check_order(responses)
        (said,) = [record for record in map(record_of_gateway, caplog.records) if record.event == "drain_cut"]
        assert said.message.endswith("s; 1 request had not finished.") and said.fields["in_flight"] == 1
        assert 0.1 <= float(str(said.fields["after_s"])) < 50.0, "what went by, not the grace period"
        os.kill(running.pid("replica-0"), signal.SIGCONT)
