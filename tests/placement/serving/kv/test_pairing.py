"""Checks who can exchange keys and values with whom."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from placement.errors import HeterodyneError, InvalidConfig
from placement.model.part import Span
from placement.model.specs import ClusterSpec, DeviceSpec, DType, NodeSpec
from placement.planning.layout import ReplicaLayout
from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Plan, Replica
from placement.planning.planner import plan_replicas
from placement.serving.kv.pairing import check_exchange
from tests.support.planning import MODEL, layouts

LIMITS = ReplicaLimits(block_size=16, token_budget=64, max_num_seqs=4)
DEVICE = DeviceSpec(kind="cpu", memory_bytes=2**40)


def plan(asked: tuple[ReplicaLayout, ...] | None = None) -> Plan:
    cluster = ClusterSpec(nodes=(NodeSpec(name="a", memory_bytes=None, devices=(DEVICE,) * 5),))
    return plan_replicas(
        MODEL, cluster, dtype=DType.FLOAT32, kv_cache_bytes=2**24, max_context_tokens=None, limits=LIMITS, layouts=asked
    )


@settings(max_examples=60, deadline=None)
@given(layouts(5))
def test_replicas_that_can_be_planned_can_exchange_however_they_are_cut(asked: tuple[ReplicaLayout, ...]) -> None:
    try:
        made = plan(asked)
    except HeterodyneError:
        return
    check_exchange(made)


@pytest.mark.parametrize("lost", ["layers", "kv_heads"])
def test_a_replica_without_some_keys_and_values_is_refused(lost: str) -> None:
    made = plan()
    whole = made.replicas[3]
    part = replace(whole.leader.part, **{lost: Span(0, 3)})
    broken = _with_part(whole, part)
    with pytest.raises(InvalidConfig) as caught:
        check_exchange(replace(made, replicas=(*made.replicas[:3], broken)))
    assert caught.value.field == "serving.parallelism.replicas[3]"
    assert "cannot exchange keys and values" in caught.value.problem and caught.value.fix


def _with_part(replica: Replica, part: object) -> Replica:
    (stage,) = replica.stages
    (shard,) = stage.shards
    return replace(replica, stages=(replace(stage, shards=(replace(shard, part=part),)),))
