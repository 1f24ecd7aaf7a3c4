"""A worker as a process of its own, with no Ray: its protocol, its fencing, its end."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio

from orchestrator.launcher.process import WorkerArgs, WorkerFailed, WorkerProcess
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc

EPOCH = 41
WHOLE = pb.Shard(layers={"stop": 2}, kv_heads={"stop": 2}, ffn_columns={"stop": 96}, vocab_rows={"stop": 509})


def load_request(path: Path, **fields: Any) -> pb.LoadRequest:
    base: dict[str, Any] = {
        "epoch": EPOCH,
        "model_path": str(path),
        "dtype": pb.DTYPE_FLOAT32,
        "shard": WHOLE,
        "block_size": 8,
        "num_blocks": 64,
        "token_budget": 32,
        "max_num_seqs": 8,
        "max_context_tokens": 256,
    }
    return pb.LoadRequest(**base | fields)


@asynccontextmanager
async def running(**fields: Any) -> AsyncIterator[tuple[WorkerProcess, Any]]:
    base: dict[str, Any] = {"bind_host": "127.0.0.1", "device": "cpu", "num_threads": 1, "epoch": EPOCH}
    args = WorkerArgs(**base | fields)
    worker = await WorkerProcess.start(args, timeout_s=60.0)
    try:
        async with grpc.aio.insecure_channel(worker.address) as channel:
            yield worker, worker_pb2_grpc.WorkerStub(channel)
    finally:
        await worker.stop(grace_s=5.0)


async def load(stub: Any, request: pb.LoadRequest) -> list[pb.LoadResponse]:
    return [message async for message in stub.Load(request, timeout=60.0)]


def submit(sequence_id: int = 1, *, epoch: int = EPOCH, **fields: Any) -> pb.LeadRequest:
    base: dict[str, Any] = {
        "sequence_id": sequence_id,
        "prompt_ids": [3, 4, 5],
        "sampling": pb.Sampling(repetition_penalty=1.0, top_p=1.0),
        "max_tokens": 4,
    }
    return pb.LeadRequest(epoch=epoch, submit=pb.Submit(**base | fields))


async def until(call: Any, wanted: str) -> Any:
    """The next event of that kind."""
    async with asyncio.timeout(20.0):
        while True:
            message = await call.read()
            assert isinstance(message, pb.LeadResponse)
            assert message.epoch == EPOCH
            if message.WhichOneof("event") == wanted:
                return getattr(message, wanted)


async def outputs(call: Any, sequence_id: int) -> list[pb.SequenceOutput]:
    """All outputs of one sequence, to its end."""
    found: list[pb.SequenceOutput] = []
    while not (found and found[-1].HasField("end")):
        step = await until(call, "step")
        found += [output for output in step.sequences if output.sequence_id == sequence_id]
    return found


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
        assert progress[-1].loaded_bytes == progress[-1].total_bytes > 0
        assert [p.loaded_bytes for p in progress] == sorted(p.loaded_bytes for p in progress)
        described = await stub.Describe(pb.DescribeRequest(epoch=EPOCH))
        assert (described.pid, described.device, described.phase) == (worker.pid, "cpu", pb.LOAD_PHASE_READY)
        assert described.kv_bytes == 2 * 2 * 2 * 64 * 8 * 16 * 4, "K and V, layers, heads, slots, head dim, float32"
        call = stub.Lead()
        await call.write(submit(max_tokens=6))
        answer = await outputs(call, 1)
        assert [output.index for output in answer] == list(range(6))
        assert answer[-1].end.reason == pb.END_REASON_LENGTH
        assert answer[0].queue_s >= 0 and answer[0].prefill_s > 0 and not answer[1].HasField("prefill_s")


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
        assert (await until(call, "load")).fenced_messages == 2


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
        ({"model_path": "/nowhere"}, "FAILED_PRECONDITION", "config.json"),
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
    async with running() as (_, stub):
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
        await call.write(submit(1, max_tokens=100))
        await call.write(pb.LeadRequest(epoch=EPOCH, drain=pb.Drain()))
        await call.write(submit(2))
        rejected = await until(call, "rejected")
        assert (rejected.sequence_id, rejected.code) == (2, grpc.StatusCode.UNAVAILABLE.value[0])
        assert (await outputs(call, 1))[-1].end.reason == pb.END_REASON_LENGTH


@pytest.mark.asyncio(loop_scope="module")
async def test_a_message_without_a_known_command_ends_the_stream(loaded_worker: Any) -> None:
    call = loaded_worker.Lead()
    await call.write(pb.LeadRequest(epoch=EPOCH))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await until(call, "rejected")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


_BROKEN_WORKER = """
import sys
from workers import __main__ as worker, runner

def execute(self, prepared):
    if len(prepared.batch.sequences[0].token_ids) == 5:
        raise RuntimeError("the device is on fire" + chr(10) + "and so is the house")
    return sampled(self, prepared)

sampled, runner.ModelRunner._execute = runner.ModelRunner._execute, execute
sys.exit(worker.main())
"""


async def test_a_failed_engine_ends_its_sequences_its_streams_and_its_process(
    llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = WorkerArgs.argv
    monkeypatch.setattr(WorkerArgs, "argv", lambda self: [sys.executable, "-c", _BROKEN_WORKER, *argv(self)[3:]])
    async with running() as (worker, stub):
        await load(stub, load_request(llama_checkpoint()))
        idle, call = stub.Lead(), stub.Lead()
        await until(idle, "load")
        await call.write(submit(1, prompt_ids=[3] * 5))
        (failed,) = await outputs(call, 1)
        assert failed.end.reason == pb.END_REASON_FAILED
        assert failed.end.detail == "RuntimeError: the device is on fire"
        for stream in (call, idle):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await until(stream, "step")
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert caught.value.details() == "the engine failed: RuntimeError: the device is on fire"
        end = await asyncio.wait_for(worker.wait(), 10.0)
        assert end.endswith("exited with code 1: engine failed: RuntimeError: the device is on fire")


async def test_a_worker_listens_on_ipv6() -> None:
    async with running(bind_host="::1") as (worker, stub):
        assert re.fullmatch(r"\[::1\]:\d+", worker.address)
        assert (await stub.Describe(pb.DescribeRequest(epoch=EPOCH))).pid == worker.pid


async def test_a_worker_on_all_interfaces_is_reached_where_it_is_advertised() -> None:
    async with running(bind_host="0.0.0.0", advertise_host="127.0.0.2") as (worker, stub):
        assert worker.address.startswith("127.0.0.2:")
        assert (await stub.Describe(pb.DescribeRequest(epoch=EPOCH))).pid == worker.pid


async def test_a_line_of_any_length_on_stderr_does_not_hide_the_last() -> None:
    code = "import sys; sys.stderr.write('x' * 500_000 + chr(10) + 'the cause'); sys.exit(3)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=asyncio.subprocess.PIPE)
    worker = WorkerProcess(process, "127.0.0.1")
    assert (await asyncio.wait_for(worker.wait(), 30.0)).endswith("exited with code 3: the cause")


async def test_a_worker_that_is_late_says_which_limit_it_missed() -> None:
    args = WorkerArgs(bind_host="127.0.0.1", device="cpu", num_threads=1, epoch=EPOCH)
    with pytest.raises(WorkerFailed, match=r"within launch.start_timeout_s = 0.01 s; raise it"):
        await WorkerProcess.start(args, timeout_s=0.01)


async def test_sigterm_ends_a_worker_in_order() -> None:
    async with running() as (worker, _):
        os.kill(worker.pid, signal.SIGTERM)
        assert "exited with code 0" in await asyncio.wait_for(worker.wait(), 10.0)


async def test_a_worker_that_cannot_start_says_why() -> None:
    args = WorkerArgs(bind_host="127.0.0.1", device="cuda:77", num_threads=1, epoch=EPOCH)
    with pytest.raises(WorkerFailed, match=r"device: torch sees \d+ GPUs here"):
        await WorkerProcess.start(args, timeout_s=60.0)


async def test_a_worker_dies_with_its_parent() -> None:
    code = (
        "import asyncio, sys\n"
        "from orchestrator.launcher.process import WorkerArgs, WorkerProcess\n"
        "async def main():\n"
        "    args = WorkerArgs(bind_host='127.0.0.1', device='cpu', num_threads=1, epoch=1)\n"
        "    worker = await WorkerProcess.start(args, timeout_s=60.0)\n"
        "    print(worker.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(await asyncio.to_thread(parent.stdout.readline)))
        parent.kill()
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [worker], 5.0)
    assert gone
