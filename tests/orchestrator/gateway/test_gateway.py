"""The gateway over real worker processes: the public protocol, its errors, and that nothing is left behind."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from tokenizers import Tokenizer

from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.deployment import Deployment, deploy, make_config, settled
from tests.support.tokenizer import save_tokenizer

PROMPT = "In the beginning"


# One deployment serves most of the tests, so they share its event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    async with deploy(make_config(tmp_path_factory.mktemp("shared"), served_checkpoint)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def deployment(shared: Deployment) -> AsyncIterator[Deployment]:
    """The shared deployment; the test must leave nothing in it."""
    yield shared
    await settled(shared)
    assert len(shared.gateway.generator.journal) == 0


@pytest_asyncio.fixture(loop_scope="module")
async def stub(deployment: Deployment) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(deployment.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


SILENCE = ("heartbeat", "ping timeout")  # whichever the frozen process misses first


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True} | fields)


async def answer(stub: Any, message: pb.GenerateRequest, **call: Any) -> list[pb.GenerateResponse]:
    return [response async for response in stub.Generate(message, timeout=30.0, **call)]


def tokens(responses: list[pb.GenerateResponse]) -> list[int]:
    return [token.id for response in responses for token in response.chunk.tokens]


def text(responses: list[pb.GenerateResponse]) -> str:
    return "".join(response.chunk.text for response in responses)


def check_order(responses: list[pb.GenerateResponse]) -> None:
    """Accepted first, Finished last and once, echo before chunks, each choice with no gap or repeat."""
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds[0] == "accepted" and kinds[-1] == "finished"
    assert set(kinds[1:-1]) <= {"echo", "chunk"}
    assert kinds[1:-1] == sorted(kinds[1:-1], reverse=True), "echo precedes chunks"
    positions: dict[int, int] = {-1: 0}
    for response in responses[1:-1]:
        part, choice = (response.echo, -1) if response.HasField("echo") else (response.chunk, response.chunk.choice)
        assert part.first_index == positions.get(choice, 0)
        positions[choice] = part.first_index + len(part.tokens)
    del positions[-1]
    assert responses[-1].finished.usage.completion_tokens == sum(positions.values())
    if responses[-1].finished.WhichOneof("outcome") == "finish_reason":
        ends = {r.chunk.choice: r.chunk.end.completion_tokens for r in responses if r.chunk.HasField("end")}
        assert ends == positions


def choices(responses: list[pb.GenerateResponse]) -> dict[int, list[int]]:
    """The tokens of each choice."""
    result: dict[int, list[int]] = {}
    for response in responses:
        if response.HasField("chunk"):
            result.setdefault(response.chunk.choice, []).extend(token.id for token in response.chunk.tokens)
    return result


async def test_greedy_tokens_are_those_of_transformers(stub: Any, served_checkpoint: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(served_checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(served_checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
    responses = await answer(stub, request(max_tokens=48))
    check_order(responses)
    assert tokens(responses) == expected
    assert text(responses) == tokenizer.decode(expected)
    finished = responses[-1].finished
    assert finished.finish_reason == pb.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.replica) == (len(ids), "replica-0")
    assert 0 <= finished.timings.queue_s <= finished.timings.time_to_first_token_s <= finished.timings.total_s


async def test_prompt_ids_are_used_as_they_are(stub: Any) -> None:
    ids = (await stub.Tokenize(pb.TokenizeRequest(text=PROMPT))).ids
    by_text, by_ids = await asyncio.gather(
        answer(stub, request()),
        answer(stub, pb.GenerateRequest(prompt_ids={"ids": ids}, max_tokens=8, ignore_eos=True)),
    )
    assert tokens(by_text) == tokens(by_ids)


async def test_a_seed_draws_the_same_answer_again_whatever_runs_beside_it(stub: Any) -> None:
    sampling = pb.SamplingParams(temperature=1.0, top_p=0.95, seed=42)
    alone = await answer(stub, request(sampling=sampling, max_tokens=24))
    crowd = await asyncio.gather(
        *(answer(stub, request(prompt=f"{i} waters", sampling=pb.SamplingParams(temperature=1.0))) for i in range(7)),
        answer(stub, request(sampling=sampling, max_tokens=24)),
    )
    assert tokens(crowd[-1]) == tokens(alone)
    assert alone[0].accepted.seed == 42
    unseeded = await answer(stub, request(sampling=pb.SamplingParams(temperature=1.0), max_tokens=24))
    again = pb.SamplingParams(temperature=1.0, seed=unseeded[0].accepted.seed)
    assert tokens(await answer(stub, request(sampling=again, max_tokens=24))) == tokens(unseeded)


async def test_a_stop_string_ends_the_text_and_the_computation(stub: Any, deployment: Deployment) -> None:
    whole = text(await answer(stub, request(max_tokens=40)))
    stop = whole[6:9]
    responses = await answer(stub, request(max_tokens=400, stop=["never there", stop]))
    check_order(responses)
    assert text(responses) == whole[: whole.index(stop)]
    finished = responses[-1].finished
    assert (finished.finish_reason, finished.matched_stop) == (pb.FINISH_REASON_STOP, stop)
    await settled(deployment)


async def test_a_stop_id_is_the_last_token(stub: Any) -> None:
    ids = tokens(await answer(stub, request(max_tokens=20)))
    responses = await answer(stub, request(max_tokens=20, stop_token_ids=[ids[7]]))
    assert tokens(responses) == ids[: ids.index(ids[7]) + 1]
    assert responses[-1].finished.finish_reason == pb.FINISH_REASON_STOP


async def test_logprobs_come_with_each_token_and_its_alternatives(stub: Any) -> None:
    responses = await answer(stub, request(logprobs=3))
    for token in [token for response in responses for token in response.chunk.tokens]:
        assert len(token.top) == 3
        assert token.top[0].token_id == token.id, "greedy takes the likeliest"
        assert token.logprob == token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob
        assert token.logprob <= 0


async def test_choices_are_what_requests_of_their_own_would_draw(stub: Any) -> None:
    def sampling(seed: int) -> pb.SamplingParams:
        return pb.SamplingParams(temperature=1.0, top_p=0.9, seed=seed)

    several = await answer(stub, request(num_choices=4, sampling=sampling(42), max_tokens=20))
    check_order(several)
    alone = await asyncio.gather(
        *(answer(stub, request(sampling=sampling(42 + choice), max_tokens=20)) for choice in range(4))
    )
    assert choices(several) == {choice: tokens(responses) for choice, responses in enumerate(alone)}
    greedy = choices(await answer(stub, request(num_choices=3)))
    assert greedy[0] == greedy[1] == greedy[2]


async def test_a_client_that_goes_leaves_no_choice_behind(stub: Any, deployment: Deployment) -> None:
    for _ in range(5):
        call = stub.Generate(request(num_choices=8, max_tokens=400, sampling=pb.SamplingParams(temperature=1.0)))
        await call.read()
        await call.read()
        call.cancel()
    await settled(deployment)


@pytest.mark.parametrize("max_tokens", [0, 4])
async def test_an_echo_judges_the_prompt_as_transformers_does(
    stub: Any, served_checkpoint: Path, max_tokens: int
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    prompt = "In the beginning God created the heaven and the earth. " * 12
    responses = await answer(stub, request(prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens))
    check_order(responses)
    echoed = [token for response in responses for token in response.echo.tokens]
    assert "".join(response.echo.text for response in responses) == prompt
    ids = Tokenizer.from_file(str(served_checkpoint / "tokenizer.json")).encode(prompt).ids
    assert [token.id for token in echoed] == ids
    model = LlamaForCausalLM.from_pretrained(served_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), dim=-1)
    assert not echoed[0].HasField("logprob")
    for token, row in zip(echoed[1:], expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        best, _ = row.topk(2)
        assert [item.logprob for item in token.top] == pytest.approx(best.tolist(), abs=1e-4)
    assert len(tokens(responses)) == max_tokens


async def test_an_echo_without_logprobs_is_the_prompt(stub: Any) -> None:
    responses = await answer(stub, request(echo=True, num_choices=2))
    check_order(responses)
    assert "".join(response.echo.text for response in responses) == PROMPT


async def test_no_stop_id_is_drawn_before_min_tokens(stub: Any) -> None:
    (first, *_) = tokens(await answer(stub, request()))
    (ended,) = [tokens(await answer(stub, request(stop_token_ids=[first])))]
    assert ended == [first]
    ids = tokens(await answer(stub, request(stop_token_ids=[first], min_tokens=5)))
    assert len(ids) >= 5 and first not in ids[:5]


async def test_a_bias_decides_and_a_penalty_dissuades(stub: Any) -> None:
    bias = [pb.LogitBias(token_id=77, bias=100.0)]
    assert tokens(await answer(stub, request(sampling=pb.SamplingParams(logit_bias=bias)))) == [77] * 8
    penalized = pb.SamplingParams(logit_bias=[pb.LogitBias(token_id=77, bias=100.0)], repetition_penalty=100.0)
    ids = tokens(await answer(stub, request(sampling=penalized)))
    assert ids[0] == 77 and set(ids[1:]) != {77}


async def test_a_prompt_seen_before_is_cached_for_those_of_its_salt(stub: Any) -> None:
    async def cached(salt: str) -> int:
        message = request(prompt="And the spirit moved upon the waters: so be it. " * 10, cache_salt=salt)
        return int((await answer(stub, message))[-1].finished.usage.cached_prompt_tokens)

    assert await cached("one") == 0
    assert await cached("one") > 0
    assert await cached("two") == 0


async def test_an_answer_matches_what_was_asked(stub: Any) -> None:
    output = pb.StructuredOutput(regex="(yes|no)[.]{3}")
    sampling = pb.SamplingParams(temperature=1.0)
    message = pb.GenerateRequest(prompt=PROMPT, structured_output=output, sampling=sampling, num_choices=4)
    responses = await answer(stub, message)
    check_order(responses)
    texts = {
        choice: "".join(r.chunk.text for r in responses if r.HasField("chunk") and r.chunk.choice == choice)
        for choice in range(4)
    }
    assert set(texts.values()) <= {"yes...", "no..."}
    assert responses[-1].finished.finish_reason == pb.FINISH_REASON_STOP


async def test_models_are_listed_with_their_limits(stub: Any, served_checkpoint: Path) -> None:
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert model == (await stub.GetModel(pb.GetModelRequest(name=served_checkpoint.name))).model
    assert (model.name, model.architecture, model.vocab_size) == (served_checkpoint.name, "llama", 509)
    assert (model.max_context_tokens, model.dtype, list(model.eos_token_ids)) == (512, "float32", [2])


async def test_detokenize_undoes_tokenize(stub: Any) -> None:
    ids = (await stub.Tokenize(pb.TokenizeRequest(text="so be it: ça va, 水"))).ids
    assert (await stub.Detokenize(pb.DetokenizeRequest(ids=ids))).text == "so be it: ça va, 水"


BAD = [
    ({"max_tokens": 0}, "max_tokens", "out of range"),
    ({"max_tokens": -1}, "max_tokens", "out of range"),
    ({"max_tokens": 2**31 - 1}, "max_tokens", "out of range"),
    ({"prompt": ""}, "prompt", "no token"),
    ({"prompt": "waters " * 600}, "prompt", "no room"),
    ({"prompt": "w" * 3_000_000}, "prompt", "longer than the context"),
    ({"sampling": {"temperature": -0.5}}, "sampling.temperature", "out of range"),
    ({"sampling": {"temperature": float("nan")}}, "sampling.temperature", "out of range"),
    ({"sampling": {"top_p": 0.0}}, "sampling.top_p", "out of range"),
    ({"sampling": {"top_k": -1}}, "sampling.top_k", "out of range"),
    ({"sampling": {"min_p": 1.5}}, "sampling.min_p", "out of range"),
    ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty", "out of range"),
    ({"sampling": {"logit_bias": [{"token_id": 509}]}}, "sampling.logit_bias[0].token_id", "out of range"),
    ({"num_choices": 2**31 - 1}, "num_choices", "out of range"),
    ({"min_tokens": 2**31 - 1}, "min_tokens", "out of range"),
    ({"cache_salt": "x" * 200}, "cache_salt", "too long"),
    ({"logprobs": 2**31 - 1}, "logprobs", "out of range"),
    ({"priority": 1000}, "priority", "out of range"),
    ({"stop": ["x"] * 17}, "stop", "too many"),
    ({"stop": [""]}, "stop[0]", "length"),
    ({"stop_token_ids": [509]}, "stop_token_ids[0]", "out of range"),
    ({"request_id": "x" * 200}, "request_id", "too long"),
]


@pytest.mark.parametrize(("fields", "name", "problem"), BAD)
async def test_a_bad_field_is_named_with_its_problem_and_its_fix(
    stub: Any, fields: dict[str, Any], name: str, problem: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(stub, request(**fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details(caught.value, error_details_pb2.BadRequest).field_violations
    assert violation.field == name
    assert problem in violation.description
    assert violation.description.rstrip(".").count(".") >= 1, "a problem and a fix"


def details(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)
    message = kind()
    assert any(detail.Unpack(message) for detail in status.details)
    return message


async def test_an_id_outside_the_vocabulary_is_refused(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(stub, pb.GenerateRequest(prompt_ids={"ids": [1, 509]}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt_ids.ids[1]" in caught.value.details()


async def test_an_unknown_model_is_not_found_on_every_call(stub: Any) -> None:
    calls = [
        answer(stub, request(model="gpt-5")),
        stub.Tokenize(pb.TokenizeRequest(model="gpt-5")),
        stub.Detokenize(pb.DetokenizeRequest(model="gpt-5")),
        stub.GetModel(pb.GetModelRequest(name="gpt-5")),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_deadline_ends_the_request_and_frees_its_blocks(stub: Any, deployment: Deployment) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(request(max_tokens=500), timeout=0.05):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await settled(deployment)


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
        await settled(running)


async def test_cancel_reaches_the_engine_and_leaves_no_task(stub: Any, deployment: Deployment) -> None:
    await answer(stub, request())
    before = len(asyncio.all_tasks())
    for _ in range(20):
        call = stub.Generate(request(max_tokens=400))
        await call.read()
        call.cancel()
    await settled(deployment)
    async with asyncio.timeout(5.0):
        while len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.05)


async def test_more_than_the_queue_holds_is_refused_with_a_retry_hint(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint, gateway={"max_in_flight": 2, "max_queued": 2})
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        results = await asyncio.gather(
            *(answer(stub, request(max_tokens=200)) for _ in range(12)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert len(refused) == 8
        for error in refused:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert details(error, error_details_pb2.RetryInfo).retry_delay.seconds >= 1
        for result in results:
            if not isinstance(result, BaseException):
                check_order(result)
        await settled(running)


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
        health_pb2.HealthCheckRequest(service="heterodyne.v1.Inference"), timeout=10.0
    )
    async for state in watch:
        if state.status == wanted:
            watch.cancel()
            return
    raise AssertionError("the watch ended")


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, ("SIGKILL",)), (signal.SIGSTOP, ("heartbeat", "ping timeout"))]
)
async def test_a_lost_worker_ends_its_requests_within_3_s_and_the_other_replica_goes_on(
    served_checkpoint: Path, tmp_path: Path, number: signal.Signals, words: tuple[str, ...]
) -> None:
    config = make_config(tmp_path, served_checkpoint, cluster={"workers": [{"device": "cpu", "count": 2}]})
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        lost_at = [0.0]

        async def one() -> tuple[str, float, list[pb.GenerateResponse]]:
            responses = []
            try:
                async for response in stub.Generate(request(max_tokens=490), timeout=60.0):
                    responses.append(response)
            except grpc.aio.AioRpcError as error:
                return error.code().name, time.monotonic() - lost_at[0], responses
            return "OK", time.monotonic() - lost_at[0], responses

        streams = [asyncio.create_task(one()) for _ in range(16)]
        while running.gateway.fleet.loads()[1].num_running < 4:
            await asyncio.sleep(0.01)
        lost_at[0] = time.monotonic()
        os.kill(running.pid("replica-1"), number)
        results = await asyncio.gather(*streams)
        failed = [result for result in results if result[0] != "OK"]
        assert len(failed) >= 4
        for code, after_s, responses in failed:
            assert code == "UNAVAILABLE"
            assert after_s < 3.0
            check_order(responses)
            assert responses[-1].finished.error.code == grpc.StatusCode.UNAVAILABLE.value[0]
        for code, _, responses in results:
            if code == "OK":
                check_order(responses)
                assert responses[-1].finished.replica == "replica-0"
        assert any(result[0] == "OK" for result in results)
        check_order(await answer(stub, request()))
        status = await lost_status(channel)
        assert any(word in status.cause for word in words), status.cause
        await settled(running)


async def lost_status(channel: grpc.aio.Channel) -> admin_pb2.ReplicaStatus:
    """The status of replica-1 once the controller has said what became of it."""
    async with asyncio.timeout(3.0):
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
        assert "replica" in caught.value.details()


async def test_drain_refuses_new_requests_and_finishes_those_in_flight(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint)
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        streams = [asyncio.create_task(answer(stub, request(max_tokens=300))) for _ in range(8)]
        while running.gateway.admission.in_flight < 8:
            await asyncio.sleep(0.005)
        drain = asyncio.create_task(running.gateway.drain())
        await watch_until(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(stub, request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        for responses in await asyncio.gather(*streams):
            check_order(responses)
            assert responses[-1].finished.finish_reason == pb.FINISH_REASON_LENGTH
        assert await drain


async def test_a_lost_controller_does_not_stop_serving(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint)
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        await running.control.stop(0.0)
        stub = inference_pb2_grpc.InferenceStub(channel)
        async with asyncio.timeout(5.0):
            while (
                await admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest())
            ).gateway.controller_connected:
                await asyncio.sleep(0.05)
        check_order(await answer(stub, request()))
        os.kill(running.pid("replica-0"), signal.SIGKILL)
        await watch_until(channel, health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_a_cut_drain_ends_every_answer_with_its_last_message(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint, gateway={"drain_grace_s": 0.1, "max_in_flight": 4})
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def one() -> tuple[str, list[pb.GenerateResponse]]:
            responses = []
            try:
                async for response in stub.Generate(request(max_tokens=490), timeout=60.0):
                    responses.append(response)
            except grpc.aio.AioRpcError as error:
                return error.code().name, responses
            return "OK", responses

        streams = [asyncio.create_task(one()) for _ in range(8)]
        while running.gateway.admission.queued < 4:
            await asyncio.sleep(0.005)
        assert not await running.gateway.drain()
        for code, responses in await asyncio.gather(*streams):
            assert code == "UNAVAILABLE"
            if responses:
                check_order(responses)
                assert responses[-1].finished.error.code == grpc.StatusCode.UNAVAILABLE.value[0]


async def test_a_client_that_stops_reading_loses_its_slot_at_its_deadline(stub: Any, deployment: Deployment) -> None:
    # Never read: the service's writes block once the window is full, or end with the request.
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(deployment.address, options=options) as channel:
        deaf = inference_pb2_grpc.InferenceStub(channel)
        calls = [deaf.Generate(request(max_tokens=450, logprobs=20), timeout=1.5) for _ in range(4)]
        await asyncio.sleep(0.2)
        check_order(await answer(stub, request()))
        await settled(deployment, timeout_s=10.0)
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
        longest_s = 0.0
        tokenizing = asyncio.ensure_future(stub.Tokenize(pb.TokenizeRequest(text=text), timeout=60.0))
        while not tokenizing.done():
            asked_s = time.monotonic()
            await health.Check(health_pb2.HealthCheckRequest())
            longest_s = max(longest_s, time.monotonic() - asked_s)
        assert len(tokenizing.result().ids) > 1000
        assert longest_s < 0.5, f"health answered after {longest_s:.2f} s"


async def test_a_second_request_to_stop_cuts_the_grace_period(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint, gateway={"drain_grace_s": 60.0})
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        responses: list[pb.GenerateResponse] = []

        async def one() -> None:
            async for response in stub.Generate(request(max_tokens=490), timeout=60.0):
                responses.append(response)

        streams = [asyncio.create_task(one())]
        while running.gateway.admission.in_flight < 1:
            await asyncio.sleep(0.005)
        os.kill(running.pid("replica-0"), signal.SIGSTOP)  # so that it cannot finish by itself
        cut = asyncio.Event()
        drain = asyncio.create_task(running.gateway.drain(cut))
        await asyncio.sleep(0.1)
        asked_s = time.monotonic()
        cut.set()
        assert not await drain
        assert time.monotonic() - asked_s < 5.0
        (result,) = await asyncio.gather(*streams, return_exceptions=True)
        assert isinstance(result, grpc.aio.AioRpcError) and result.code() is grpc.StatusCode.UNAVAILABLE
        check_order(responses)
        os.kill(running.pid("replica-0"), signal.SIGCONT)
