"""Checks the measurement of a rank's device, here and in a process of its own."""

import asyncio
import math
from typing import Any

import grpc
import psutil
import pytest

from placement.errors import NotEnoughMemory
from placement.model.quantization import Quantization
from placement.model.specs import DType
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.clocks import PATIENCE_S
from tests.support.gateway.leader_stream import EPOCH
from tests.support.worker import load, load_request, running
from workers.host.cores import claim_cores
from workers.host.device import Device, open_device
from workers.startup import speed
from workers.startup.speed import Products, measure_speed

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
    measured = measure_speed(device, products, meet=nothing)
    # Between a tenth of the slowest memory, and what no core reads.
    assert 1e8 < measured.weight_bytes_per_s < 1e12
    assert 1e8 < measured.flops_per_s < 1e14
    assert process.memory_info().rss - before_bytes < 128 * 2**20
    again = claim_cores(1)
    assert bool(again.cpus) == bool(free_cpus.cpus)
    again.release()


def test_a_measurement_ends_when_the_others_do_not_come() -> None:
    def nobody() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        measure_speed(open_device("cpu", 1), Products(dtype=DType.BFLOAT16), meet=nobody)


def test_without_memory_to_spare_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "available_memory_bytes", 300 * 2**20)
    with pytest.raises(NotEnoughMemory, match=r"of cpu: .* 512 MiB must be free, and 300 MiB are\. .*parallelism"):
        measure_speed(open_device("cpu", 1), Products(dtype=DType.BFLOAT16), meet=nothing)


def test_weights_are_more_than_a_cache_of_32_mib_holds_and_less_than_256_mib() -> None:
    assert speed._BYTES > 4 * 32 * 2**20 and speed._BYTES + speed._WEIGHT_BYTES <= 256 * 2**20
    assert speed._BYTES % speed._WEIGHT_BYTES == 0


async def ready(stub: Any, request: pb.MeasureSpeedRequest = BF16) -> Any:
    """Opens the stream of a worker that waits to measure."""
    call = stub.MeasureSpeed(timeout=PATIENCE_S)
    await call.write(request)
    assert await call.read() == pb.MeasureSpeedResponse(epoch=request.epoch)
    return call


async def status_of(call: Any, request: pb.MeasureSpeedRequest) -> tuple[grpc.StatusCode, str]:
    await call.write(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value.code(), caught.value.details() or ""


async def test_workers_are_measured_together_before_they_load(llama_checkpoint: Any) -> None:
    async with running() as (_, one), running() as (_, two):
        calls = await asyncio.gather(ready(one), ready(two))
        for call in calls:
            await call.write(BF16)
        found = await asyncio.gather(*(call.read() for call in calls))
        assert all(0 < rate < math.inf for each in found for rate in (each.weight_bytes_per_s, each.flops_per_s))
        assert (await load(one, load_request(llama_checkpoint())))[-1].phase == pb.LOAD_PHASE_READY
        code, words = await status_of(one.MeasureSpeed(timeout=PATIENCE_S), BF16)
    assert code is grpc.StatusCode.FAILED_PRECONDITION and "has loaded a model already" in words


async def test_a_measurement_of_another_epoch_or_of_an_unknown_type_is_refused() -> None:
    async with running() as (_, stub):
        old = await status_of(stub.MeasureSpeed(), pb.MeasureSpeedRequest(epoch=EPOCH - 1))
        unknown = await status_of(stub.MeasureSpeed(), pb.MeasureSpeedRequest(epoch=EPOCH))
    assert old[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert unknown[0] is grpc.StatusCode.INVALID_ARGUMENT and "dtype" in unknown[1]


@pytest.mark.parametrize("how", ["cancel", "done_writing"])
async def test_a_worker_whose_measurement_was_given_up_loads(llama_checkpoint: Any, how: str) -> None:
    async with running() as (_, stub):
        call = await ready(stub)
        gone = call.cancel() if how == "cancel" else await call.done_writing()
        assert gone in (True, None)
        assert (await load(stub, load_request(llama_checkpoint())))[-1].phase == pb.LOAD_PHASE_READY
