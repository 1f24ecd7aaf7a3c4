"""The demo model through real Ray and real gRPC, started as a user starts it."""

import asyncio
import random
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import pytest

from orchestrator.launcher.ray_access import answers_without_token
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.integration import test_readme as readme
from tests.support.clocks import PATIENCE_S, own_time
from tests.support.deploying.ray_access import Listener, code_in_ray, listeners, missing_ss
from tests.support.deploying.service import Command, orchestrator, serve

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

NUM_STREAMS = 64
LOAD_S = 60.0
NUM_CANCELS = 1000
# Allocators give nothing back; what grows with the number of requests would be far beyond this.
MAX_GROWTH_BYTES = 24 << 20
SCHEMA = '{"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"boolean"}},"required":["a","b"]}'
PROMPTS = [
    "And it came to pass",
    "The LORD said unto Moses,",
    "In the beginning",
    "Blessed are they that",
    "And David " * 24,
    "Now therefore hear the word, " * 12,
    "B",
    "And the children of Israel did that which was evil " * 9,
]
LENGTHS = [1, 5, 17, 64, 128, 33, 96, 200]


@dataclass(frozen=True)
class Service:
    command: Command
    address: str
    prometheus: str


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """The README's own; most tests of a running service share it."""
    # float32: greedy answers then do not depend on what else is in the batch. A KV cache that is soon all in use: until
    # then it takes more memory as it fills.
    settings = {"HETERODYNE_MODEL__DTYPE": "float32", "HETERODYNE_SERVING__KV_CACHE": "128MiB"}
    with readme.serve_as_written(**settings) as command:
        yield Service(command, readme.ADDRESS, f"http://{readme.METRICS}/metrics")
        output = command.stop_cleanly()
    assert "event=drained" in output
    assert "Traceback" not in output


def request(index: int, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=PROMPTS[index % len(PROMPTS)], max_tokens=LENGTHS[index % len(LENGTHS)], ignore_eos=True, **fields
    )


async def tokens(stub: Any, message: pb.GenerateRequest) -> list[int]:
    """The answer's token ids, after the order of messages was checked."""
    responses = [response async for response in stub.Generate(message, timeout=2 * PATIENCE_S)]
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds[0] == "accepted" and kinds[-1] == "finished" and set(kinds[1:-1]) == {"chunk"}
    ids: list[int] = []
    for response in responses[1:-1]:
        assert response.chunk.first_index == len(ids)
        ids += [token.id for token in response.chunk.tokens]
    finished = responses[-1].finished
    assert finished.finish_reason == pb.FINISH_REASON_LENGTH, finished
    assert finished.usage.completion_tokens == len(ids) == message.max_tokens
    return ids


def status(address: str) -> admin_pb2.GetStatusResponse:
    with grpc.insecure_channel(address) as channel:
        return admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=PATIENCE_S)


def check_everything_is_back(address: str) -> None:
    """All KV blocks free, nothing running, waiting, in flight or queued."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        now = status(address)
        idle = not (now.gateway.in_flight or now.gateway.queued)
        for replica in now.replicas:
            load = replica.load
            idle = idle and load.free_blocks == load.total_blocks and not (load.num_running or load.num_waiting)
        if idle:
            return
        assert time.monotonic() < deadline, now
        time.sleep(0.1)


def mixed(index: int) -> pb.GenerateRequest:
    """Requests that differ in all that a batch can: how tokens are drawn, from what, and how many answers."""
    match index % 4:
        case 0:
            return request(index)
        case 1:
            return request(index, sampling=pb.SamplingParams(temperature=0.9, top_p=0.9, seed=index, min_p=0.01))
        case 2:
            sampling = pb.SamplingParams(temperature=1.1, seed=index, repetition_penalty=1.2, presence_penalty=0.5)
            return request(index, sampling=sampling, logprobs=2, num_choices=1)
        case _:
            return request(index, sampling=pb.SamplingParams(top_k=40, temperature=0.7, seed=7), cache_salt="x")


def worker_process(service: Service) -> psutil.Process:
    (worker,) = [psutil.Process(rank.pid) for replica in status(service.address).replicas for rank in replica.ranks]
    return worker


def gateway_process(service: Service) -> psutil.Process:
    (gateway,) = [p for p in service.command.family.seen if p.is_running() and "orchestrator.gateway" in p.cmdline()]
    return gateway


def resident_bytes(service: Service) -> dict[str, int]:
    """Memory of the worker and the gateway."""
    worker, gateway = worker_process(service), gateway_process(service)
    return {"worker": worker.memory_info().rss, "gateway": gateway.memory_info().rss}


def test_every_command_of_the_readme_runs_beside_it(service: Service) -> None:
    readme.run_every_command_that_talks_to_it()
    readme.run_python_examples()


async def test_64_streams_of_mixed_requests_for_60_s_give_the_answers_they_give_alone(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        alone = [await tokens(stub, mixed(i)) for i in range(len(PROMPTS))]
        started = time.monotonic()

        async def stream(number: int) -> int:
            done = 0
            while time.monotonic() < started + LOAD_S:
                index = (number + done) % len(PROMPTS)
                assert await tokens(stub, mixed(index)) == alone[index]
                done += 1
            return done

        streams = asyncio.gather(*(stream(number) for number in range(NUM_STREAMS)))
        await asyncio.sleep(LOAD_S / 3)
        service.command.family.look()
        before = resident_bytes(service)
        done = await streams
        after = resident_bytes(service)
    assert min(done) >= 1
    assert {name: max(0, after[name] - before[name] - MAX_GROWTH_BYTES) for name in after} == {
        "worker": 0,
        "gateway": 0,
    }
    check_everything_is_back(service.address)


async def test_1000_random_cancels_and_disconnects_leave_nothing_behind(service: Service) -> None:
    worker = worker_process(service)
    num_threads = worker.num_threads()

    async def one(index: int, shared: grpc.aio.Channel) -> None:
        chance = random.Random(index)  # of its own: who asks first then changes nothing
        await asyncio.sleep(chance.uniform(0.0, 20.0))
        message = mixed(index)
        message.max_tokens = 400
        if index % 5 == 0:
            message.structured_output.json_schema = SCHEMA
        if index % 7 == 0:
            message.num_choices, message.echo = 3, True
        if index % 3:
            call = inference_pb2_grpc.InferenceStub(shared).Generate(message, timeout=2 * PATIENCE_S)
            await read_some(call, chance)
            call.cancel()
        else:  # the whole connection goes
            own = grpc.aio.insecure_channel(service.address, options=[("grpc.use_local_subchannel_pool", 1)])
            call = inference_pb2_grpc.InferenceStub(own).Generate(message, timeout=2 * PATIENCE_S)
            await read_some(call, chance)
            await own.close()

    async with grpc.aio.insecure_channel(service.address) as shared:
        await asyncio.gather(*(one(index, shared) for index in range(NUM_CANCELS)))
        check_everything_is_back(service.address)
        assert await tokens(inference_pb2_grpc.InferenceStub(shared), request(1))
    # Grammars are compiled on the event loop's own few threads, which stay.
    assert worker.num_threads() <= num_threads + 8


async def read_some(call: Any, chance: random.Random) -> None:
    """Read none, one or several messages, or for a random while."""
    try:
        async with asyncio.timeout(chance.uniform(0.0, 0.5)):
            for _ in range(chance.choice([0, 1, 2, 10, 50])):
                if await call.read() is grpc.aio.EOF:
                    return
    except TimeoutError:
        return


def test_metrics_are_scraped_under_the_genai_names(service: Service) -> None:
    with orchestrator("generate", "In the beginning", "--address", service.address, "--max-tokens", "8") as generated:
        assert generated.process.wait(timeout=PATIENCE_S) == 0
        assert re.search(r"8 generated on replica-0; ended by its length; time to first token", generated.output())
    with urllib.request.urlopen(service.prometheus, timeout=PATIENCE_S) as reply:
        metrics = reply.read().decode()
    for name in (
        "gen_ai_server_request_duration_seconds_bucket",
        "gen_ai_server_time_to_first_token_seconds_bucket",
        "gen_ai_server_time_per_output_token_seconds_bucket",
        "gen_ai_client_token_usage_bucket",
        "heterodyne_replica_kv_cache_usage{",
        'gen_ai_request_model="demo"',
    ):
        assert name in metrics, metrics[:2000]
    assert "In the beginning" not in metrics


def test_status_shows_who_holds_what(service: Service) -> None:
    with orchestrator("status", "--address", service.address) as shown:
        assert shown.process.wait(timeout=PATIENCE_S) == 0
        output = shown.output()
    (replica,) = status(service.address).replicas
    assert f"replica=replica-0 state=READY epoch={replica.epoch} rank=0" in output
    assert f"pid={replica.ranks[0].pid}" in output and "device=cpu" in output
    budget = replica.budget
    assert f"event=step_budget replica=replica-0 token_budget={budget.token_budget} auto=true expected_s=" in output
    assert 32 <= budget.token_budget <= 512 and budget.expected_s > 0 and budget.steps[0].num_tokens == 1
    assert f'event=step_budget source="worker worker-0" token_budget={budget.token_budget}' in service.command.output()


@pytest.mark.skipif((reason := missing_ss()) is not None, reason=reason or "")
def test_every_process_listens_on_loopback_alone(service: Service) -> None:
    service.command.family.look()
    found = listeners(process.pid for process in service.command.family.seen)
    there = {listener.process for listener in found}
    assert {"gcs_server", "raylet", "ray::DashboardA", "ray::RuntimeEnv", "ray::Controller", "ray::NodeAgent"} <= there
    pids = {listener.pid for listener in found}
    ours = {"worker": worker_process(service).pid, "gateway": gateway_process(service).pid}
    assert {name: pid for name, pid in ours.items() if pid not in pids} == {}
    of_gateway = {listener.port for listener in found if listener.pid == ours["gateway"]}
    assert {int(address.rpartition(":")[2]) for address in (readme.ADDRESS, readme.HTTP)} <= of_gateway
    assert [listener for listener in found if not listener.on_loopback] == []


@pytest.mark.parametrize(
    ("host", "on_loopback"),
    [
        ("127.0.0.1", True), ("[::1]", True), ("[::ffff:127.0.0.1]", True), ("127.0.0.53%lo", True), ("*", False),
        ("0.0.0.0", False), ("[::]", False), ("192.0.2.2", False), ("[::ffff:192.0.2.2]", False),
        ("[fe80::1%e0]", False), ("192.0.2.2%e0", False),
    ],
)  # fmt: skip
def test_loopback_is_told_from_elsewhere(host: str, on_loopback: bool) -> None:
    assert Listener(process="", pid=0, host=host, port=0).on_loopback is on_loopback


def raylet(service: Service) -> psutil.Process:
    service.command.family.look()
    (found,) = [p for p in service.command.family.seen if p.is_running() and p.name() == "raylet"]
    return found


def test_the_ray_that_serve_starts_runs_no_code_of_strangers(service: Service) -> None:
    flag = "--gcs-address="
    (address,) = [arg.removeprefix(flag) for arg in raylet(service).cmdline() if arg.startswith(flag)]
    token = raylet(service).environ()["RAY_AUTH_TOKEN"]
    assert not answers_without_token(address)
    with (
        code_in_ray(address, token=token) as ours,
        code_in_ray(address, token=None) as nobody,
        code_in_ray(address, token="0" * len(token)) as guesser,
    ):
        assert ours.process.wait(timeout=2 * PATIENCE_S) == 0, ours.output()
        assert "answer=42" in ours.output()
        for stranger in (nobody, guesser):
            assert stranger.process.wait(timeout=2 * PATIENCE_S) == 1, stranger.output()
            assert "token is missing or incorrect" in stranger.output() and "answer=42" not in stranger.output()


def test_what_does_not_connect_to_ray_has_not_its_token(service: Service) -> None:
    token = raylet(service).environ()["RAY_AUTH_TOKEN"]
    for process in (worker_process(service), gateway_process(service)):
        assert token not in [*process.environ().values(), *process.cmdline()]


async def test_sigint_drains_while_a_worker_was_killed_under_load() -> None:
    command, address = serve("cluster.workers=[{device: cpu, count: 2, threads: 1}]", "gateway.drain_grace_s=200")
    with command:
        await kill_and_drain(command, address)


async def kill_and_drain(command: Command, address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel, own_time() as clock:
        stub = inference_pb2_grpc.InferenceStub(channel)
        killed_s = [0.0]

        async def one(index: int) -> tuple[str, float]:
            # Prompts of one length, so that the replicas get equal shares of them.
            message = pb.GenerateRequest(prompt=f"And it came to pass {index:02}", max_tokens=600, ignore_eos=True)
            try:
                async for _ in stub.Generate(message, timeout=200.0):
                    pass
            except grpc.aio.AioRpcError as error:
                return error.code().name, clock.now_s - killed_s[0]
            return "OK", clock.now_s - killed_s[0]

        async with asyncio.timeout(PATIENCE_S):
            # A replica that the gateway has not heard of yet would get none of the requests.
            while not all(replica.HasField("load") for replica in status(address).replicas):
                await asyncio.sleep(0.05)
        streams = [asyncio.create_task(one(index)) for index in range(16)]
        async with asyncio.timeout(PATIENCE_S):
            while min(replica.load.num_running for replica in status(address).replicas) < 4:
                await asyncio.sleep(0.05)
        victim = status(address).replicas[1].ranks[0].pid
        killed_s[0] = clock.now_s
        psutil.Process(victim).kill()
        words = rf"event=replica replica=replica-1 phase=failed .*{victim} was killed by SIGKILL"
        await asyncio.to_thread(command.wait_for, words, PATIENCE_S)
        # Ctrl-C with the other replica's requests still in flight: they finish.
        command.process.send_signal(signal.SIGINT)
        results = await asyncio.gather(*streams)
    lost = [after_s for code, after_s in results if code == "UNAVAILABLE"]
    assert len(lost) >= 4 and max(lost) < 3.0
    assert [code for code, _ in results].count("OK") == len(results) - len(lost) > 0
    assert command.process.wait(timeout=2 * PATIENCE_S) == 0, command.output()
    assert not command.family.alive()
    assert "event=drained" in command.output()
    # All processes speak alike, and a loss, which is expected in operation, is a line.
    assert [line for line in command.output().splitlines() if not re.match(r"time=\S+Z level=\w+ ", line)] == []
