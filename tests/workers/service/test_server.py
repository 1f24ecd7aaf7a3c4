"""A worker as a process of its own, with no Ray: its protocol, its fencing, its end."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from orchestrator.launcher.process import WorkerArgs, WorkerFailed, WorkerProcess
from placement.measured.collectives import MEASURED_BYTES
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.gateway.leader_stream import EPOCH, drain, submit
from tests.support.worker import collect, load, load_request, outputs, running, running_here, until
from workers.collectives.algorithms import ALL_REDUCES
from workers.collectives.backends import Library


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def loaded_worker(llama_checkpoint: Any) -> AsyncIterator[Any]:
    """The stub of a worker that is ready."""
    async with running() as (_, stub):
        await load(stub, load_request(llama_checkpoint()))
        yield stub


async def test_load_reports_progress_and_serves(llama_checkpoint: Any) -> None:
    path = llama_checkpoint()
    async with running() as (worker, stub):
        progress = await load(stub, load_request(path))
        assert progress[-1].phase == pb.LOAD_PHASE_READY
        alone = [pb.LOAD_PHASE_WEIGHTS, pb.LOAD_PHASE_KV_CACHE, pb.LOAD_PHASE_COMPILE, pb.LOAD_PHASE_WARM_UP]
        assert pb.LOAD_PHASE_COMPILE in {p.phase for p in progress} <= {*alone, pb.LOAD_PHASE_READY}
        assert progress[-1].loaded_bytes == progress[-1].total_bytes > 0
        assert not progress[-1].HasField("measured"), "one rank measures nothing"
        assert [p.loaded_bytes for p in progress] == sorted(p.loaded_bytes for p in progress)
        described = await stub.Describe(pb.DescribeRequest(epoch=EPOCH))
        assert (described.pid, described.device, described.phase) == (worker.pid, "cpu", pb.LOAD_PHASE_READY)
        assert described.kv_bytes == 2 * 2 * 2 * 64 * 8 * 16 * 4, "K and V, layers, heads, slots, head dim, float32"
        budget = described.load.budget
        assert (budget.token_budget, budget.is_auto) == (32, False) and budget.expected_s > 0
        assert [step.num_tokens for step in budget.steps] == [1, 2, 4, 8, 16, 32]
        call = stub.Lead()
        assert (await until(call, "load")).budget == budget
        await call.write(submit(max_tokens=6))
        answer = await outputs(call, 1)
        assert [output.index for output in answer] == list(range(6))
        assert answer[-1].end.reason == pb.END_REASON_LENGTH
        assert answer[0].queue_s >= 0 and answer[0].prefill_s > 0 and not answer[1].HasField("prefill_s")


async def test_the_first_of_two_ranks_tells_at_the_end_of_its_load_how_they_compute(llama_checkpoint: Any) -> None:
    path = llama_checkpoint()
    async with running() as (first, first_stub), running() as (second, second_stub):
        members = [
            pb.Member(host="127.0.0.1", port=worker.ranks_port, shard=half(rank))
            for rank, worker in enumerate((first, second))
        ]
        fields = {
            "members": members,
            "token": bytes(32),
            "token_budget": 64,
        }  # as many tokens as two micro-batches take
        requests = [load_request(path, shard=half(rank), **fields) for rank in range(2)]
        told = await asyncio.gather(load(first_stub, requests[0]), load(second_stub, requests[1]))
    *before, last = told[0]
    assert not any(message.measured.ByteSize() for message in (*before, *told[1]))
    assert tuple(measured.num_bytes for measured in last.measured.sums) == MEASURED_BYTES
    assert all(
        measured.algorithm in (*ALL_REDUCES, Library.GLOO) and measured.duration_s > 0
        for measured in last.measured.sums
    )
    overlap = last.measured.overlap
    assert overlap and all(each.num_tokens and each.alone_s > 0 < each.overlapped_s for each in overlap)
    assert not last.measured.HasField("exchange"), "they share no sequences"


def half(rank: int) -> pb.Shard:
    """A half of every layer."""

    def span(size: int) -> pb.Range:
        return pb.Range(start=rank * size // 2, stop=(rank + 1) * size // 2)

    return pb.Shard(rank=rank, layers={"stop": 2}, kv_heads=span(2), ffn_columns=span(96), vocab_rows=span(509))


async def test_heartbeats_come_when_idle_and_count_steps_when_busy(llama_checkpoint: Any) -> None:
    async with running() as (_, stub):
        await load(stub, load_request(llama_checkpoint()))
        call = stub.Lead()
        first, second = await until(call, "load"), await until(call, "load")
        assert first.steps == second.steps == 0
        assert first.free_blocks == first.total_blocks == 64
        await call.write(submit(max_tokens=5))
        await outputs(call, 1)
        while (after := await until(call, "load")).num_running:
            pass
        assert (after.steps, after.prompt_tokens, after.output_tokens) == (5, 3, 5)
        assert after.free_blocks == 64


async def test_messages_of_another_epoch_are_refused_and_counted(llama_checkpoint: Any) -> None:
    async with running() as (_, stub):
        for call in (
            load(stub, load_request(llama_checkpoint(), epoch=EPOCH - 1)),
            stub.Describe(pb.DescribeRequest(epoch=EPOCH + 1)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "fenced" in caught.value.details()
        await load(stub, load_request(llama_checkpoint()))
        call = stub.Lead()
        await call.write(submit(1, epoch=EPOCH - 1))
        rejected = await until(call, "rejected")
        assert rejected.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        await call.write(submit(2, max_tokens=200))
        await call.write(pb.LeadRequest(epoch=EPOCH - 1, cancel=pb.Cancel(sequence_id=2)))
        assert (await outputs(call, 2))[-1].end.reason == pb.END_REASON_LENGTH, "an old cancel does nothing"
        while (report := await until(call, "load")).fenced_messages < 2:
            pass
        assert report.fenced_messages == 2


async def test_a_broken_stream_gives_its_blocks_back(llama_checkpoint: Any) -> None:
    async with running() as (_, stub):
        await load(stub, load_request(llama_checkpoint()))
        call = stub.Lead()
        for number in range(4):
            await call.write(submit(number, max_tokens=100))
        await until(call, "step")
        call.cancel()
        again = stub.Lead()
        while (report := await until(again, "load")).num_running:
            pass
        assert report.free_blocks == report.total_blocks


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_ids": [509]}, "prompt_ids"),
        ({"prompt_ids": []}, "prompt"),
        ({"sampling": pb.Sampling(repetition_penalty=1.0, top_p=1.0, temperature=float("nan"))}, "temperature"),
        ({"sampling": pb.Sampling(repetition_penalty=1.0, top_p=0.0)}, "top_p"),
        ({"sampling": pb.Sampling(repetition_penalty=1.0, top_p=1.0, top_k=-1)}, "top_k"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": 2**31 - 1}, "max_tokens"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_bad_submission_is_rejected_and_the_stream_lives(
    loaded_worker: Any, bad: dict[str, Any], word: str
) -> None:
    call = loaded_worker.Lead()
    await call.write(submit(1, **bad))
    rejected = await until(call, "rejected")
    assert rejected.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert word in rejected.message
    await call.write(submit(2))
    assert (await outputs(call, 2))[-1].end.reason == pb.END_REASON_LENGTH
    call.cancel()


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"model_path": "/nowhere"}, "FAILED_PRECONDITION", "no directory of this machine"),
        ({"dtype": pb.DTYPE_UNSPECIFIED}, "INVALID_ARGUMENT", "dtype"),
        ({"block_size": 0}, "INVALID_ARGUMENT", "block_size"),
        ({"max_context_tokens": 100_000}, "INVALID_ARGUMENT", "max_context_tokens"),
        ({"num_blocks": 2**31 - 1}, "RESOURCE_EXHAUSTED", "serving.kv_cache: "),
        ({"token_budget": 2**31 - 1}, "RESOURCE_EXHAUSTED", "serving.token_budget: "),
        ({"shard": pb.Shard(layers={"start": 0, "stop": 99})}, "INVALID_ARGUMENT", "shard.layers"),
        ({"shard": pb.Shard(layers={"stop": 1}, kv_heads={"stop": 2})}, "INVALID_ARGUMENT", "shard"),
    ],
)
async def test_a_load_that_cannot_work_says_why(
    llama_checkpoint: Any, fields: dict[str, Any], code: str, word: str
) -> None:
    async with running_here() as stub:
        request = load_request(llama_checkpoint())
        for name, value in fields.items():
            request.ClearField(name)
            request.MergeFrom(pb.LoadRequest(**{name: value}))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await load(stub, request)
        assert caught.value.code().name == code
        assert word in caught.value.details()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Lead().read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_drain_lets_sequences_finish_and_refuses_new_ones(llama_checkpoint: Any) -> None:
    async with running() as (_, stub):
        await load(stub, load_request(llama_checkpoint()))
        call = stub.Lead()
        for request in (submit(1, max_tokens=100), drain(), submit(2)):
            await call.write(request)
        events = await collect(call, lambda answers: answers.keys() == {1, 2})
        assert events[1].reason == pb.END_REASON_LENGTH
        assert events[2].code == grpc.StatusCode.UNAVAILABLE.value[0]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_message_without_a_known_command_ends_the_stream(loaded_worker: Any) -> None:
    call = loaded_worker.Lead()
    await call.write(pb.LeadRequest(epoch=EPOCH))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await until(call, "rejected")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_worker_listens_on_ipv6() -> None:
    async with running(bind_host="::1") as (worker, stub):
        assert re.fullmatch(r"\[::1\]:\d+", worker.address)
        assert (await stub.Describe(pb.DescribeRequest(epoch=EPOCH))).pid == worker.pid


async def test_a_worker_on_all_interfaces_is_reached_where_it_is_advertised() -> None:
    async with running(bind_host="0.0.0.0", advertise_host="127.0.0.2") as (worker, stub):
        assert worker.address.startswith("127.0.0.2:")
        assert (await stub.Describe(pb.DescribeRequest(epoch=EPOCH))).pid == worker.pid


async def test_a_line_of_any_length_on_stderr_does_not_hide_the_last() -> None:
    code = "import sys; sys.stderr.write('x' * 500_000 + chr(10) + 'the cause'); sys.exit(4)"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=pipe, stderr=pipe)
    worker = WorkerProcess(process, host="127.0.0.1", source="worker")
    assert (await asyncio.wait_for(worker.wait(), 30.0)).cause.endswith("exited with code 4: the cause")


async def test_a_worker_that_is_late_says_which_limit_it_missed() -> None:
    args = WorkerArgs(bind_host="127.0.0.1", device="cpu", num_threads=1, epoch=EPOCH)
    with pytest.raises(WorkerFailed, match=r"within launch.start_timeout_s = 0.01 s; raise it"):
        await WorkerProcess.start(args, timeout_s=0.01)


async def test_a_worker_that_cannot_start_says_why() -> None:
    args = WorkerArgs(bind_host="127.0.0.1", device="cuda:77", num_threads=1, epoch=EPOCH)
    with pytest.raises(WorkerFailed, match=r"device: torch sees \d+ GPUs here"):
        await WorkerProcess.start(args, timeout_s=60.0)
