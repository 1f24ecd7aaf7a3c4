"""Checks what the executing thread does before the first request."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.cpu import variant as cpu
from kernels.cuda import plan
from placement.model.specs import DType
from placement.planning import memory
from placement.planning.memory import graph_bytes
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.allocations import peak_bytes
from tests.support.triton.table_kernels import TableKernels
from workers.host.device import Device
from workers.startup import warm_up as module
from workers.startup.checks import read_model
from workers.startup.warm_up import capture_decodes, capture_for, executing_thread, warm_up
from workers.step.graphs import Replay, StepMemory
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput

REQUEST = pb.LoadRequest(block_size=8, num_blocks=4, token_budget=16, max_num_seqs=3, max_context_tokens=100)


@pytest.fixture
def set_devices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.device]]:
    """Records threads and the GPUs that they were set to."""
    found: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: found.append((threading.current_thread().name, device))
    )
    return found


def test_the_thread_that_executes_works_on_its_own_gpu(set_devices: list[tuple[str, torch.device]]) -> None:
    gpu = torch.device("cuda", 1)
    with executing_thread(Device(name="cuda:1", torch_device=gpu, total_memory_bytes=0, num_threads=1)) as executor:
        assert executor.submit(lambda: list(set_devices)).result() == [("runner_0", gpu)]


def test_a_cpu_has_neither_a_gpu_set_nor_steps_recorded(set_devices: list[tuple[str, torch.device]]) -> None:
    module.use_device(torch.device("cpu"))
    assert not set_devices
    assert capture_for(torch.device("cpu"), cpu) is None
    assert capture_for(torch.device("cuda", 0), reference) is None


def test_steps_of_decodes_are_recorded_on_the_thread_that_executes(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path, threads = llama_checkpoint(), list[str]()
    runner = make_runner(path, kernels=TableKernels())

    def capture(run: Callable[[], None]) -> Replay:
        threads.append(threading.current_thread().name)
        run()
        return run

    device = Device(name="cpu", torch_device=torch.device("cpu"), total_memory_bytes=0, num_threads=1)
    with executing_thread(device) as executor:
        executor.submit(warm_up, runner, model=read_model(path), request=REQUEST).result()
        executor.submit(capture_decodes, runner, REQUEST, capture).result()
    assert threads == ["runner_0"] * 3  # of 3, 2 and 1 decodes
    sequences = [SequenceInput(token_ids=[1], start=7, runs=((8 * i, 8 * i + 8),)) for i in range(4)]
    graphs = runner._graphs
    assert graphs is not None
    taken = [graphs.can_run(runner.lay_out(Batch(sequences=tuple(sequences[:count]))).inputs) for count in (1, 3, 4)]
    assert taken == [True, True, False]


def test_there_are_no_graphs_before_they_are_captured(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = llama_checkpoint()
    for num_blocks in (0, 4):  # even where there is no room for one token and the next
        runner = make_runner(path)
        request = pb.LoadRequest(block_size=1, num_blocks=num_blocks, token_budget=16)
        warm_up(runner, model=read_model(path), request=request)
        assert runner._graphs is None


def test_the_tables_of_the_largest_graph_are_reckoned(
    checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    """Everything else that is reckoned is measured on a GPU."""
    path = checkpoint("mistral", sliding_window=24)
    model, runner = read_model(path), make_runner(path, kernels=TableKernels())
    like = runner.lay_out(Batch(sequences=(SequenceInput(token_ids=[0], start=0, runs=((0, 1),)),))).inputs
    tokens = memory.graphed_tokens(64, model.max_context_tokens)
    held: list[StepMemory] = []
    taken = peak_bytes(lambda: held.append(StepMemory(like=like, max_decodes=64, max_tokens=tokens)))
    parts = tokens // plan.PART + 64
    assert memory._PART == plan.PART
    for room in held[0].step(64).attention.values():
        assert isinstance(room, plan.DevicePlan) and room.num_partials == parts
    reckoned = len(model.distinct_windows) * (4 * tokens + 48 * parts + 48 * 64) + 24 * 64
    assert 0.95 * reckoned < taken <= reckoned + 100
    assert graph_bytes(model, dtype=DType.FLOAT32, max_num_seqs=64) > taken + memory._GRAPH_SLACK_BYTES
