"""How a worker's process ends: whatever was under way is answered, and the process is gone within its deadline."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.gateway.leader_stream import EPOCH, submit
from tests.support.worker import (
    collect,
    connected,
    have_accident,
    load,
    load_request,
    next_event,
    outputs,
    running,
    status_of,
    until,
    worker_with,
)

# The process has 4 s for it; the rest is for a busy machine.
END_S = 10.0
HANGS = "time.sleep(1000)"
ACCIDENT = {"prompt_ids": [3] * 5, "max_tokens": 200}


async def test_a_failed_engine_ends_its_sequences_its_streams_and_its_process(
    llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_accident(monkeypatch, "raise RuntimeError('the device is on fire' + chr(10) + 'and so is the house')")
    async with running() as (worker, stub):
        await load(stub, load_request(llama_checkpoint()))
        idle, call = stub.Lead(), stub.Lead()
        await until(idle, "load")
        await call.write(submit(1, prompt_ids=[3] * 5))
        (failed,) = await outputs(call, 1)
        assert failed.end.reason == pb.END_REASON_FAILED
        assert failed.end.detail == "RuntimeError: the device is on fire"
        for stream in (call, idle):
            status = await status_of(stream)
            assert status.code() is grpc.StatusCode.INTERNAL
            assert status.details() == "the engine failed: RuntimeError: the device is on fire"
        end = (await asyncio.wait_for(worker.wait(), END_S)).cause
        assert end.endswith("exited with code 1: engine failed: RuntimeError: the device is on fire")


async def test_sigterm_ends_a_worker_in_order() -> None:
    async with running() as (worker, _):
        os.kill(worker.pid, signal.SIGTERM)
        assert "exited with code 0" in (await asyncio.wait_for(worker.wait(), END_S)).cause


SLOW_LOAD = """
def run(self):
    time.sleep(1.5)  # more than the streams have to end
    self._go_on()
from workers.startup import loading
loading.LoadJob.run = run
"""
SLOW_MEASUREMENT = """
def measure_speed(*_, **__):
    time.sleep(1.5)
from workers.startup import speed_job
speed_job.measure_speed = measure_speed
"""


@pytest.mark.parametrize("slow", [SLOW_LOAD, SLOW_MEASUREMENT])
@pytest.mark.parametrize("leaves", [False, True])
async def test_sigterm_ends_loading_and_measuring_without_an_error_that_is_logged(slow: str, leaves: bool) -> None:
    argv = [*worker_with("pass", more=slow), "--threads", "1", "--epoch", str(EPOCH), "--log-format", "json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True) as worker:
        try:
            assert worker.stdout is not None and worker.stderr is not None
            said = json.loads(await asyncio.to_thread(worker.stdout.readline))
            async with connected(said["address"]) as stub:
                if slow is SLOW_LOAD:
                    call = stub.Load(load_request(Path("/nowhere")))
                    await call.read()
                else:
                    call = stub.MeasureSpeed()
                    await call.write(pb.MeasureSpeedRequest(epoch=EPOCH, dtype=pb.DTYPE_FLOAT32))
                    await stub.Describe(pb.DescribeRequest(epoch=EPOCH))  # by then the worker has the former, too
                if leaves:
                    call.cancel()
                worker.terminate()
                if not leaves:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        async with asyncio.timeout(END_S):
                            while await call.read() is not grpc.aio.EOF:
                                pass
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                    assert caught.value.details() == "this worker stops"
                assert await asyncio.to_thread(worker.wait, END_S) == 0
            assert await asyncio.to_thread(worker.stderr.read) == ""
        finally:
            worker.kill()


async def test_sigterm_answers_what_is_under_way(llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten sequences of a worker that holds eight, in steps so slow that none ends by itself."""
    have_accident(monkeypatch, "pass", always="time.sleep(0.1)")
    async with running() as (worker, stub):
        await load(stub, load_request(llama_checkpoint()))
        idle, call = stub.Lead(), stub.Lead()
        await until(idle, "load")
        for number in range(10):
            await call.write(submit(number, max_tokens=200))
        while (await until(idle, "load")).num_waiting < 2:
            pass
        os.kill(worker.pid, signal.SIGTERM)
        answers = await collect(call, lambda answers: len(answers) == 10)
        assert {answer.reason for answer in answers.values()} == {pb.END_REASON_FAILED}
        assert {answer.detail for answer in answers.values()} == {"Stopping: this worker stops"}
        for stream in (call, idle):
            status = await status_of(stream)
            assert (status.code(), status.details()) == (grpc.StatusCode.UNAVAILABLE, "this worker stops")
        assert "exited with code 0" in (await asyncio.wait_for(worker.wait(), END_S)).cause


async def stopped_in_an_accident(worker: Any, stub: Any, checkpoint: Path) -> Any:
    """The stream of a worker that was told to end while it runs into the accident."""
    await load(stub, load_request(checkpoint))
    call = stub.Lead()
    await call.write(submit(1, **ACCIDENT))
    while not (await until(call, "load")).num_running:
        pass
    os.kill(worker.pid, signal.SIGTERM)
    return call


async def test_a_step_that_hangs_does_not_outlive_sigterm(
    llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_accident(monkeypatch, HANGS)
    async with running() as (worker, stub):
        call = await stopped_in_an_accident(worker, stub, llama_checkpoint())
        answers = await collect(call, lambda answers: 1 in answers)
        assert answers[1].reason == pb.END_REASON_FAILED
        assert (await status_of(call)).code() is grpc.StatusCode.UNAVAILABLE
        end = (await asyncio.wait_for(worker.wait(), END_S)).cause
        assert "exited with code 1: error: not ended 4 s after it was to stop" in end
        assert "runner_0" in end, "the thread that hangs is named"


async def test_a_step_that_keeps_the_interpreters_lock_does_not_outlive_sigterm(
    llama_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeps = (
        "while not signal.getitimer(signal.ITIMER_REAL)[0]: time.sleep(0.01)\n        ctypes.PyDLL(None).sleep(1000)"
    )
    have_accident(monkeypatch, keeps)
    async with running() as (worker, stub):
        await stopped_in_an_accident(worker, stub, llama_checkpoint())
        assert (await asyncio.wait_for(worker.wait(), END_S)).cause.endswith("was killed by SIGALRM")


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


async def test_a_step_that_hangs_does_not_outlive_the_parent(llama_checkpoint: Any) -> None:
    """Also where the kernel does not kill a process with its parent."""
    argv = worker_with(HANGS, more="worker.die_with_parent = lambda parent_pid: None")
    code = (
        "import os, subprocess, sys, time\n"
        "more = ['--threads', '1', '--parent-pid', str(os.getpid())]\n"
        "subprocess.Popen([*sys.argv[1:], *more], start_new_session=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, *argv, "--epoch", str(EPOCH)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = json.loads(await asyncio.to_thread(parent.stdout.readline))
        worker = psutil.Process(said["pid"])
        try:
            async with connected(said["address"]) as stub:
                await load(stub, load_request(llama_checkpoint()))
                call = stub.Lead()
                await call.write(submit(1, **ACCIDENT))
                while not (await until(call, "load")).num_running:
                    pass
                parent.kill()
                assert (await status_of(call)).code() is grpc.StatusCode.UNAVAILABLE
            gone, _ = await asyncio.to_thread(psutil.wait_procs, [worker], END_S)
            assert gone
        finally:
            parent.kill()
            if worker.is_running():
                worker.kill()


async def test_a_gateway_that_does_not_read_hears_why_it_lost_its_stream(llama_checkpoint: Any) -> None:
    """Through a connection that buffers little; and others are served meanwhile."""
    small = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))
    async with running() as (worker, stub), connected(worker.address, *small) as slow:
        await load(stub, load_request(llama_checkpoint()))
        deaf, call = slow.Lead(), stub.Lead()
        await until(deaf, "load")
        for number in range(9000):  # several times what the outbox and both ends of the connection hold
            await deaf.write(submit(number, epoch=EPOCH - 1))
        await deaf.write(submit(9000, max_tokens=200))
        await call.write(submit(1))
        assert (await outputs(call, 1))[-1].end.reason == pb.END_REASON_LENGTH
        while (report := await until(call, "load")).free_blocks < 64 or report.num_running:
            pass
        refused = 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                refused += (await next_event(deaf)).HasField("rejected")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "does not read" in (caught.value.details() or "")
        assert refused < 9000
        again = slow.Lead()
        await again.write(submit(1))
        assert (await outputs(again, 1))[-1].end.reason == pb.END_REASON_LENGTH
