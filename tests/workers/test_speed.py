"""How fast a rank's device is measured to be, here and in a process of its own."""

import asyncio
import math
import time
from typing import Any

import grpc
import psutil
import pytest

from placement.errors import NotEnoughMemory
from placement.quantization import Quantization
from placement.specs import DType
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.clocks import PATIENCE_S
from tests.support.leader_stream import EPOCH
from tests.support.worker import load, load_request, running
from workers import speed
from workers.cores import claim_cores
from workers.device import Device, open_device
from workers.speed import Products, measure_speed

BF16 = pb.MeasureSpeedRequest(epoch=EPOCH, dtype=pb.DTYPE_BFLOAT16)


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    "products",
    [Products(dtype=dtype) for dtype in DType]
    + [Products(dtype=DType.BFLOAT16, quantization=way) for way in (Quantization.INT8, Quantization.INT4)],
    ids=["float32", "bfloat16", "int8", "int4"],
)
def test_a_device_has_a_speed_for_each_kind_of_weights_and_its_memory_and_cores_back(products: Products) -> None:
    device = open_device("cpu", 1)
    process = psutil.Process()
    before_bytes, free_cpus = process.memory_info().rss, claim_cores(1)
    free_cpus.release()
    measured = measure_speed(device, products, nothing)
    # Between a tenth of the slowest memory, and what no core reads.
    assert 1e8 < measured.weight_bytes_per_s < 1e12
    assert 1e8 < measured.flops_per_s < 1e14
    assert process.memory_info().rss - before_bytes < 128 * 2**20
    again = claim_cores(1)
    assert bool(again.cpus) == bool(free_cpus.cpus)
    again.release()


def test_a_measurement_ends_when_it_is_told_to() -> None:
    calls: list[float] = []

    def end() -> None:
        calls.append(time.monotonic())
        if len(calls) > 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        measure_speed(open_device("cpu", 1), Products(dtype=DType.BFLOAT16), end)
    assert len(calls) == 4


def test_without_memory_to_spare_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "available_memory_bytes", 300 * 2**20)
    with pytest.raises(NotEnoughMemory, match=r"memory of cpu: .* 512 MiB must be free .*serving.parallelism"):
        measure_speed(open_device("cpu", 1), Products(dtype=DType.BFLOAT16), nothing)


def test_weights_are_more_than_a_cache_of_32_mib_holds_and_less_than_256_mib() -> None:
    assert speed._BYTES > 4 * 32 * 2**20 and speed._BYTES + speed._WEIGHT_BYTES <= 256 * 2**20
    assert speed._BYTES % speed._WEIGHT_BYTES == 0


async def test_workers_are_measured_together_before_they_load(llama_checkpoint: Any) -> None:
    async with running() as (_, one), running() as (_, two):
        found = await asyncio.gather(*(stub.MeasureSpeed(BF16, timeout=PATIENCE_S) for stub in (one, two)))
        assert all(0 < rate < math.inf for each in found for rate in (each.weight_bytes_per_s, each.flops_per_s))
        assert (await load(one, load_request(llama_checkpoint())))[-1].phase == pb.LOAD_PHASE_READY
        with pytest.raises(grpc.aio.AioRpcError, match="this worker has loaded a model already"):
            await one.MeasureSpeed(BF16, timeout=PATIENCE_S)


async def test_a_measurement_of_another_epoch_or_of_an_unknown_type_is_refused() -> None:
    async with running() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as old:
            await stub.MeasureSpeed(pb.MeasureSpeedRequest(epoch=EPOCH - 1), timeout=PATIENCE_S)
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.MeasureSpeed(pb.MeasureSpeedRequest(epoch=EPOCH), timeout=PATIENCE_S)
    assert old.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert unknown.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "dtype" in (unknown.value.details() or "")


async def test_a_worker_whose_measurement_was_given_up_loads(llama_checkpoint: Any) -> None:
    async with running() as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.MeasureSpeed(BF16, timeout=0.3)
        assert (await load(stub, load_request(llama_checkpoint())))[-1].phase == pb.LOAD_PHASE_READY
