"""The controller's state as messages."""

import math
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.controller.state import Phase, RankState, ReplicaState, State
from orchestrator.controller.wire import deployment, device_speed, loading
from placement.measured.collectives import MeasuredSum
from placement.measured.exchange import ExchangeSpeeds, ExpectedExchange, MeasuredExchange
from placement.measured.measurements import NOTHING_MEASURED, StageMeasurements
from placement.measured.overlap import MeasuredOverlap
from placement.measured.speed import DeviceSpeed
from placement.model.part import Part, Span
from placement.model.specs import DeviceSpec, DType
from placement.planning.plan import Role, Shard
from protos.codec.loading import Loading
from protos.codec.measured import read_measurements
from protos.codec.roles import read_role
from protos.heterodyne.worker.v1 import worker_pb2

MEASURED = StageMeasurements(
    sums=(
        MeasuredSum(num_bytes=1024, algorithm="direct", duration_s=5e-5),
        MeasuredSum(num_bytes=4096, algorithm="scatter", duration_s=1.5),
    ),
    overlap=(
        MeasuredOverlap(num_tokens=64, alone_s=1e-3, overlapped_s=2e-3, is_overlapped=False),
        MeasuredOverlap(num_tokens=128, alone_s=3e-3, overlapped_s=2.5e-3, is_overlapped=True),
    ),
    exchange=MeasuredExchange(
        speeds=ExchangeSpeeds(latency_s=1e-3, bytes_per_s=1e8, pairs_per_s=(2e8, 1e8), call_s=1e-4),
        expected=(ExpectedExchange(num_tokens=512, num_before=2048, way="ring", layer_s=4e-3),),
    ),
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
    measured=MEASURED,
)


def replica(*ranks: RankState, **more: Any) -> ReplicaState:
    settings: dict[str, Any] = {"name": "replica-0", "block_size": 16, "dtype": DType.FLOAT32} | more
    return ReplicaState(epoch=1, ranks=ranks, **settings)


def test_what_a_rank_measured_reaches_the_watchers_as_it_came() -> None:
    ranks = (RANK, replace(RANK, shard=replace(RANK.shard, rank=1), measured=NOTHING_MEASURED))
    state = State(replicas=(replica(*ranks),))
    first, second = deployment(state, version=1).replicas[0].ranks
    assert list(first.measured.sums) == [
        worker_pb2.MeasuredSum(num_bytes=1024, algorithm="direct", duration_s=5e-5),
        worker_pb2.MeasuredSum(num_bytes=4096, algorithm="scatter", duration_s=1.5),
    ]
    assert read_measurements(first.measured) == MEASURED
    assert read_measurements(second.measured) == NOTHING_MEASURED


@pytest.mark.parametrize("does", list(Loading))
def test_a_rank_says_who_it_is_and_what_it_does_until_it_is_ready(does: Loading) -> None:
    shard = replace(RANK.shard, device=replace(RANK.shard.device, worker="big"))
    rank = replace(RANK, shard=shard, phase=Phase.LOADING, loading=does, loaded_bytes=10, total_bytes=900)
    state = State(replicas=(replica(rank),))
    (message,) = deployment(state, version=1).replicas[0].ranks
    assert (message.worker, message.loaded_bytes, message.total_bytes) == ("big", 10, 900)
    assert loading(message.load_phase) is does


def test_watchers_learn_the_target_of_each_rank_and_the_dtype_of_all() -> None:
    ranks = (replace(RANK, target="avx2"), RANK)
    message = deployment(State(replicas=(replica(*ranks),), dtype=DType.BFLOAT16), version=1)
    assert [rank.target for rank in message.replicas[0].ranks] == ["avx2", ""]
    assert message.dtype == worker_pb2.DTYPE_BFLOAT16
    assert deployment(State(), version=1).dtype == worker_pb2.DTYPE_UNSPECIFIED


def test_watchers_learn_what_each_replica_is_for_and_the_sizes_that_it_has_of_its_own() -> None:
    prefill = replica(RANK, role=Role.PREFILL, block_size=32, dtype=DType.BFLOAT16)
    rest = [replica(RANK, name=f"replica-{role.value}", role=role) for role in (Role.DECODE, Role.MIXED)]
    told = deployment(State(replicas=(prefill, *rest), dtype=DType.FLOAT32), version=1).replicas
    assert [read_role(each.role) for each in told] == [Role.PREFILL, Role.DECODE, Role.MIXED]
    assert [each.block_size for each in told] == [32, 16, 16]
    assert [each.dtype for each in told] == [worker_pb2.DTYPE_BFLOAT16, *[worker_pb2.DTYPE_FLOAT32] * 2]


def test_a_speed_is_what_a_device_can_have() -> None:
    told = worker_pb2.MeasureSpeedResponse(weight_bytes_per_s=2e10, flops_per_s=1e11)
    assert device_speed(told) == DeviceSpeed(weight_bytes_per_s=2e10, flops_per_s=1e11)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_speed_that_no_device_can_have_is_none(rate: float) -> None:
    assert device_speed(worker_pb2.MeasureSpeedResponse(weight_bytes_per_s=rate, flops_per_s=1.0)) is None
    assert device_speed(worker_pb2.MeasureSpeedResponse(weight_bytes_per_s=1.0, flops_per_s=rate)) is None
