"""The controller's state as messages."""

import math
from dataclasses import replace

import pytest

from orchestrator.controller.state import Phase, RankState, ReplicaState, State
from orchestrator.controller.wire import deployment, device_speed, measured_sums
from placement.collectives import MeasuredSum
from placement.plan import Part, Shard, Span
from placement.specs import DeviceSpec
from placement.speed import DeviceSpeed
from protos.heterodyne.worker.v1 import worker_pb2

SUMS = (
    MeasuredSum(num_bytes=1024, algorithm="direct", duration_s=5e-5),
    MeasuredSum(num_bytes=4096, algorithm="scatter", duration_s=1.5),
)
RANK = RankState(
    shard=Shard(
        rank=0,
        node="here",
        device=DeviceSpec(kind="cpu", memory_bytes=1 << 30),
        part=Part(layers=Span(0, 2), kv_heads=Span(0, 1), ffn_columns=Span(0, 8), vocab_rows=Span(0, 32)),
        num_blocks=8,
        weight_bytes=1000,
        kv_bytes=100,
        workspace_bytes=10,
    ),
    phase=Phase.READY,
    sums=SUMS,
)


def test_what_a_rank_measured_reaches_the_watchers_as_it_came() -> None:
    ranks = (RANK, replace(RANK, shard=replace(RANK.shard, rank=1), sums=()))
    state = State(replicas=(ReplicaState(name="replica-0", epoch=1, ranks=ranks),))
    first, second = deployment(state, version=1).replicas[0].ranks
    assert list(first.sums) == [
        worker_pb2.MeasuredSum(num_bytes=1024, algorithm="direct", duration_s=5e-5),
        worker_pb2.MeasuredSum(num_bytes=4096, algorithm="scatter", duration_s=1.5),
    ]
    assert measured_sums(first.sums) == SUMS
    assert measured_sums(second.sums) == ()


def test_a_speed_is_what_a_device_can_have() -> None:
    told = worker_pb2.MeasureSpeedResponse(weight_bytes_per_s=2e10, flops_per_s=1e11)
    assert device_speed(told) == DeviceSpeed(weight_bytes_per_s=2e10, flops_per_s=1e11)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_speed_that_no_device_can_have_is_none(rate: float) -> None:
    assert device_speed(worker_pb2.MeasureSpeedResponse(weight_bytes_per_s=rate, flops_per_s=1.0)) is None
    assert device_speed(worker_pb2.MeasureSpeedResponse(weight_bytes_per_s=1.0, flops_per_s=rate)) is None
