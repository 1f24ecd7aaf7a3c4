"""Checks how many KV blocks there are where no size is set."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from placement.errors import HeterodyneError, NotEnoughMemory
from placement.model.specs import ClusterSpec, DeviceSpec, DType, NodeSpec
from placement.planning.auto import choose_layouts
from placement.planning.kv_size import CPU_SHARE, GPU_SHARE, SHORT_SEQUENCE_TOKENS, UNKNOWN_MEMORY_KV_BYTES
from placement.planning.layout import ReplicaLayout, Split, StageLayout
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import CPU_PROCESS_BYTES, CUDA_PROCESS_BYTES
from placement.planning.plan import Plan, Shard
from placement.planning.planner import plan_replicas
from tests.support.planning import MIB, MODEL, Case, cases
from tests.support.shapes import LLAMA_8B

GIB = 2**30
LARGE = replace(LLAMA_8B, max_context_tokens=131072)
LIMITS = ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=32)


def cpu(gib: float) -> DeviceSpec:
    return DeviceSpec(kind="cpu", memory_bytes=int(gib * GIB))


def node(name: str, *devices: DeviceSpec, memory_bytes: int | None = None) -> NodeSpec:
    return NodeSpec(name=name, memory_bytes=memory_bytes, devices=devices)


def plan(*nodes: NodeSpec, kv_cache_bytes: int | None = None, **more: Any) -> Plan:
    settings: dict[str, Any] = {"max_context_tokens": None, "limits": LIMITS} | more
    return plan_replicas(
        LARGE, ClusterSpec(nodes=nodes), dtype=DType.BFLOAT16, kv_cache_bytes=kv_cache_bytes, **settings
    )


def fixed(shard: Shard) -> int:
    process = CPU_PROCESS_BYTES if shard.device.kind == "cpu" else CUDA_PROCESS_BYTES
    return shard.weight_bytes + shard.workspace_bytes + process


def over(*weights: float, split: Split = "tensor") -> list[ReplicaLayout]:
    stage = StageLayout(devices=tuple(range(len(weights))), weights=weights, split=split)
    return [ReplicaLayout(stages=(stage,))]


@pytest.mark.parametrize(("kind", "share"), [("cpu", CPU_SHARE), ("cuda", GPU_SHARE)])
def test_kv_blocks_get_the_stated_share_of_what_is_left(kind: Literal["cpu", "cuda"], share: float) -> None:
    device = replace(cpu(24), kind=kind)
    (replica,) = plan(node("a", device)).replicas
    (shard,) = replica.shards
    left = 24 * GIB - fixed(shard)
    block = shard.kv_bytes // shard.num_blocks
    assert replica.kv_sized_by == "memory"
    assert share * left - block < shard.kv_bytes <= share * left


def test_workers_of_one_node_share_what_its_memory_leaves() -> None:
    made = plan(node("a", cpu(64), cpu(64), memory_bytes=64 * GIB))
    shards = [replica.leader for replica in made.replicas]
    left = 64 * GIB - sum(map(fixed, shards))
    assert shards[0].num_blocks == shards[1].num_blocks
    assert left * CPU_SHARE - 8 * MIB < sum(shard.kv_bytes for shard in shards) <= left * CPU_SHARE


@pytest.mark.parametrize("split", ["tensor", "sequence"])
def test_the_rank_with_the_least_memory_for_its_share_decides_for_all(split: str) -> None:
    made = plan(node("a", cpu(200)), node("b", cpu(24)), layouts=over(3, 1, split=split))
    large, small = made.replicas[0].shards
    assert large.num_blocks == small.num_blocks
    left = 24 * GIB - fixed(small)
    assert left * CPU_SHARE - 8 * MIB < small.kv_bytes <= left * CPU_SHARE
    assert large.kv_bytes == 3 * small.kv_bytes


def test_nobody_gets_more_than_all_sequences_can_use() -> None:
    limits = replace(LIMITS, max_num_seqs=2)
    (replica,) = plan(node("a", cpu(64)), max_context_tokens=1000, limits=limits).replicas
    assert (replica.num_blocks, replica.kv_sized_by) == (2 * 63, "sequences")


def test_where_memory_is_not_known_there_is_a_size_that_stands_in_for_it() -> None:
    gpu = DeviceSpec(kind="cuda", memory_bytes=None)
    made = plan(node("a", gpu), node("b", cpu(64)))
    unknown, known = made.replicas
    assert (unknown.leader.kv_bytes, unknown.kv_sized_by) == (UNKNOWN_MEMORY_KV_BYTES, "unknown memory")
    assert known.kv_sized_by == "memory" and known.leader.kv_bytes > GIB
    assert made.model.max_context_tokens == unknown.num_kv_tokens == 2048


def test_a_context_that_is_asked_for_is_held_even_where_memory_is_not_known() -> None:
    gpu = DeviceSpec(kind="cuda", memory_bytes=None)
    made = plan(node("a", gpu), max_context_tokens=8000)
    assert made.replicas[0].num_kv_tokens == made.model.max_context_tokens == 8000


def test_a_context_that_memory_does_not_hold_is_refused_with_the_memory_that_does() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        plan(node("a", cpu(16)), max_context_tokens=8192)
    error = caught.value
    assert (error.field, error.value) == ("model.max_context_tokens", 8192)
    assert "1 worker needs 16.4 GiB to serve 8192 tokens (" in error.problem
    with pytest.raises(NotEnoughMemory) as unset:
        plan(node("a", replace(cpu(0), memory_bytes=fixed(plan(node("a", cpu(64))).replicas[0].leader) + 100 * MIB)))
    assert (unset.value.field, unset.value.value) == ("model.max_context_tokens", None)
    (memory, context) = error.remedies
    assert memory.worker_bytes.keys() == {"each worker"} and (context.max_context_tokens or 0) in range(1024, 8192)
    assert plan(node("a", cpu(memory.worker_bytes["each worker"] / GIB)), max_context_tokens=8192).replicas
    assert plan(node("a", cpu(16)), max_context_tokens=context.max_context_tokens).replicas


def test_what_is_left_is_not_shared_where_one_sequence_needs_it_all() -> None:
    """Half of it would hold less than one short sequence."""
    (roomy,) = plan(node("a", cpu(64))).replicas
    shard = roomy.leader
    short = shard.kv_bytes // shard.num_blocks * SHORT_SEQUENCE_TOKENS // LIMITS.block_size
    made = plan(node("a", replace(cpu(0), memory_bytes=fixed(shard) + short)))
    assert (made.model.max_context_tokens, made.replicas[0].leader.kv_bytes) == (SHORT_SEQUENCE_TOKENS, short)
    with pytest.raises(NotEnoughMemory):
        plan(node("a", replace(cpu(0), memory_bytes=fixed(shard) + short - 1)))


def test_kv_blocks_take_what_the_cut_leaves_and_do_not_push_it() -> None:
    """The shares by speed are those that a cache of one short sequence allows, which is 256 MiB of the whole."""
    cluster = ClusterSpec(nodes=(node("a", cpu(14)), node("b", cpu(9))))
    chosen = [
        choose_layouts(
            partial(
                plan_replicas, LARGE, dtype=DType.BFLOAT16, max_context_tokens=None, limits=LIMITS,
                kv_cache_bytes=size,
            ),
            cluster,
        )
        for size in (None, 200 * MIB)
    ]  # fmt: skip
    auto, small = chosen
    assert auto.split_by == small.split_by == "threads"
    assert [shard.part for shard in auto.plan.replicas[0].shards] == [
        shard.part for shard in small.plan.replicas[0].shards
    ]
    assert auto.plan.replicas[0].num_kv_tokens > small.plan.replicas[0].num_kv_tokens


def auto(case: Case) -> Plan:
    return plan_replicas(
        MODEL, case.cluster, layouts=case.layouts,
        **(case.arguments() | {"kv_cache_bytes": None}),
    )  # fmt: skip


def planned(case: Case) -> Plan:
    try:
        return auto(case)
    except HeterodyneError:
        reject()


@settings(max_examples=80, deadline=None)
@given(cases())
def test_kv_blocks_fit_hold_a_sequence_and_are_no_more_than_of_use(case: Case) -> None:
    made = planned(case)
    shards = [shard for replica in made.replicas for shard in replica.shards]
    for replica in made.replicas:
        assert len({shard.num_blocks for shard in replica.shards}) == 1
        assert made.model.max_context_tokens <= replica.num_kv_tokens
        longest = case.max_context_tokens or MODEL.max_context_tokens
        assert replica.num_blocks <= case.limits.max_num_seqs * -(-longest // replica.limits.block_size)
    assert made.model.max_context_tokens >= (case.max_context_tokens or SHORT_SEQUENCE_TOKENS)
    for each in case.cluster.nodes:
        there = [shard for shard in shards if shard.node == each.name]
        assert all(fixed(shard) + shard.kv_bytes <= (shard.device.memory_bytes or math.inf) for shard in there)
        on_cpu = [shard for shard in there if shard.device.kind == "cpu"]
        if each.memory_bytes is not None:
            assert sum(fixed(shard) + shard.kv_bytes for shard in on_cpu) <= each.memory_bytes


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 2), st.integers(0, 1), st.integers(1, 300 * MIB))
def test_more_memory_never_gives_fewer_blocks(case: Case, which: int, device: int, more: int) -> None:
    before = planned(case)
    nodes = list(case.cluster.nodes)
    grown = nodes[which % len(nodes)]
    devices = list(grown.devices)
    place = device % len(devices)
    if (known := devices[place].memory_bytes) is not None:
        devices[place] = replace(devices[place], memory_bytes=known + more)
    own = None if grown.memory_bytes is None else grown.memory_bytes + more
    nodes[which % len(nodes)] = replace(grown, memory_bytes=own, devices=tuple(devices))
    after = auto(replace(case, cluster=ClusterSpec(nodes=tuple(nodes))))
    for less, greater in zip(before.replicas, after.replicas, strict=True):
        assert less.num_blocks <= greater.num_blocks


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_size_that_auto_chose_gives_the_same_plan_when_it_is_set(case: Case) -> None:
    made = planned(case)
    sizes = {max(shard.kv_bytes for shard in replica.shards) for replica in made.replicas}
    if len(sizes) > 1:  # one setting is for all replicas
        reject()
    same = plan_replicas(
        MODEL, case.cluster, layouts=case.layouts,
        **(case.arguments() | {"kv_cache_bytes": max(sizes)}),
    )  # fmt: skip
    assert all(replica.kv_sized_by == "setting" for replica in same.replicas)
    assert [replica.stages for replica in same.replicas] == [replica.stages for replica in made.replicas]
    assert same.model == made.model
