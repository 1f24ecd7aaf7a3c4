"""Checks where weights go, and how a model that does not fit is refused."""

import dataclasses
from typing import Any

import pytest

from placement.errors import InvalidConfig, NotEnoughMemory
from placement.model.part import Part
from placement.model.specs import ClusterSpec, DeviceSpec, DType, NodeSpec
from placement.model.weights import num_parameters
from placement.planning.layout import ReplicaLayout, StageLayout
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import CPU_PROCESS_BYTES, footprint, format_bytes
from placement.planning.plan import Plan
from placement.planning.planner import plan_replicas
from tests.support import planning

MIB = 2**20
# A block of 16 tokens takes 2 * 4 layers * 16 tokens * 4 heads * 64 * 4 bytes = 128 KiB.
MODEL = dataclasses.replace(planning.MODEL, max_context_tokens=2048)
LIMITS = ReplicaLimits(block_size=16, token_budget=64, max_num_seqs=4)
BLOCK_BYTES = 128 * 2**10
FIXED = footprint(
    MODEL,
    Part.whole(MODEL),
    dtype=DType.FLOAT32,
    kv_bytes=0,
    limits=LIMITS,
    on_cpu=True,
).total_bytes


def cpu(memory_bytes: int) -> DeviceSpec:
    return DeviceSpec(kind="cpu", memory_bytes=memory_bytes, num_threads=2)


def node(*devices: DeviceSpec, memory_bytes: int, name: str = "local") -> NodeSpec:
    return NodeSpec(name=name, memory_bytes=memory_bytes, devices=devices)


def plan(*nodes: NodeSpec, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "dtype": DType.FLOAT32,
        "kv_cache_bytes": 16 * MIB,
        "max_context_tokens": None,
        "limits": LIMITS,
    }
    return plan_replicas(MODEL, ClusterSpec(nodes=nodes), **(settings | changes))


def roomy(num_devices: int = 1, name: str = "local") -> NodeSpec:
    return node(*[cpu(2**34)] * num_devices, memory_bytes=2**36, name=name)


def refused(*nodes: NodeSpec, **changes: Any) -> NotEnoughMemory:
    with pytest.raises(NotEnoughMemory) as caught:
        plan(*nodes, **changes)
    return caught.value


def test_each_device_holds_a_whole_replica_in_order() -> None:
    made = plan(roomy(2, name="a"), roomy(1, name="b"))
    assert [(r.name, r.leader.node) for r in made.replicas] == [
        ("replica-0", "a"), ("replica-1", "a"), ("replica-2", "b"),
    ]  # fmt: skip
    for replica in made.replicas:
        (shard,) = replica.shards
        assert (shard.rank, shard.part) == (0, Part.whole(MODEL))
        assert (shard.num_blocks, shard.kv_bytes) == (128, 16 * MIB)
        assert shard.weight_bytes == 4 * num_parameters(MODEL)
    assert (made.dtype, made.model) == (DType.FLOAT32, MODEL)
    assert all(replica.limits is LIMITS for replica in made.replicas)


def test_smaller_context_is_what_is_served() -> None:
    assert plan(roomy(), max_context_tokens=100).model == dataclasses.replace(MODEL, max_context_tokens=100)


def test_context_shrinks_to_the_cache_when_none_was_asked_for() -> None:
    made = plan(roomy(), kv_cache_bytes=3 * BLOCK_BYTES + 1)
    assert made.model.max_context_tokens == 48
    assert made.replicas[0].leader.kv_bytes == 3 * BLOCK_BYTES


def test_cache_without_one_block_is_refused() -> None:
    error = refused(roomy(), kv_cache_bytes=BLOCK_BYTES - 1)
    assert (error.field, error.value) == ("serving.kv_cache", "128 KiB")
    assert error.problem == "holds no block: one of 16 tokens takes 128 KiB"
    assert error.fix == "Set serving.kv_cache to 128 KiB or more."


def test_cache_too_small_for_the_context_asked_for_is_refused() -> None:
    error = refused(roomy(), max_context_tokens=1000, kv_cache_bytes=MIB)
    assert (error.field, error.value) == ("serving.kv_cache", "1 MiB")
    assert error.problem == "holds 128 tokens, and one sequence may have 1000"
    assert error.fix == "Set serving.kv_cache to 8 MiB or more, or set model.max_context_tokens to 128 or less."
    assert plan(roomy(), max_context_tokens=1000, kv_cache_bytes=8 * MIB).model.max_context_tokens == 1000


def test_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(InvalidConfig) as caught:
        plan(roomy(), max_context_tokens=2049)
    error = caught.value
    assert (error.field, error.value) == ("model.max_context_tokens", 2049)
    assert error.problem == "is more than the 2048 tokens that the model was made for"
    assert error.fix == "Set it to 2048 or less."


def test_cache_that_does_not_fit_the_device_is_refused_with_the_size_that_does() -> None:
    memory = FIXED + 10 * MIB + 5
    error = refused(node(cpu(memory), memory_bytes=2**36))
    assert (error.field, error.value) == ("serving.kv_cache", "16 MiB")
    assert error.problem.startswith(f"1 worker needs {format_bytes(FIXED + 16 * MIB)} (")
    assert error.problem.endswith(f"), and cpu of node local has {format_bytes(memory)}")
    assert error.fix == "Set serving.kv_cache to 10 MiB or less."
    assert plan(node(cpu(memory), memory_bytes=2**36), kv_cache_bytes=10 * MIB).replicas


def test_model_that_does_not_fit_the_device_is_refused_with_the_memory_it_needs() -> None:
    error = refused(node(cpu(CPU_PROCESS_BYTES), memory_bytes=2**36))
    enough = -(-(FIXED + 16 * MIB) // MIB)
    assert (error.field, error.value) == ("model.path", None) and "(11 MiB weights" in error.problem
    assert error.fix == f"Use a smaller model, or give each worker {enough} MiB or more."
    assert plan(node(cpu(enough * MIB), memory_bytes=2**36)).replicas


def test_workers_that_fit_alone_but_not_together_are_refused() -> None:
    memory = 2 * FIXED + 8 * MIB
    error = refused(node(cpu(memory), cpu(memory), memory_bytes=memory))
    assert error.field == "serving.kv_cache"
    assert "2 workers need" in error.problem and "each), and node local has" in error.problem
    assert error.fix == "Set serving.kv_cache to 4 MiB or less."


def test_refusal_says_how_many_workers_a_node_can_run() -> None:
    memory = 2 * FIXED + 32 * MIB
    error = refused(node(*[cpu(memory)] * 3, memory_bytes=memory))
    assert error.field == "model.path"
    assert error.fix.startswith("Run 2 of them there, use a smaller model, or free ")
    assert error.fix.endswith(" MiB on node local.")


def test_unmeasured_device_is_planned_unchecked() -> None:
    gpu = DeviceSpec(kind="cuda", index=1, memory_bytes=None)
    made = plan(node(gpu, memory_bytes=1))
    assert made.replicas[0].leader.device == gpu
    assert refused(node(dataclasses.replace(gpu, memory_bytes=1), memory_bytes=1)).field == "model.path"


def test_a_stated_memory_counts_beside_a_neighbour_that_states_none() -> None:
    """Both are called cpu, and neither is known by its node's memory."""
    stated, silent = (
        dataclasses.replace(cpu(CPU_PROCESS_BYTES), worker="big"),
        DeviceSpec(kind="cpu", memory_bytes=None),
    )
    nodes = NodeSpec(name="a", memory_bytes=None, devices=(silent, stated))
    error = refused(nodes)
    assert error.field == "model.path" and "worker big has 384 MiB" in error.problem
    (size,) = error.remedies[0].worker_bytes.values()
    enough = dataclasses.replace(stated, memory_bytes=size)
    assert len(plan(dataclasses.replace(nodes, devices=(silent, enough))).replicas) == 2


def cut_over(*weights: float) -> ReplicaLayout:
    return ReplicaLayout(stages=(StageLayout(devices=tuple(range(len(weights))), weights=weights),))


def test_ranks_have_as_many_blocks_as_the_one_with_the_largest_has_room_for() -> None:
    made = plan(roomy(2), layouts=[cut_over(3, 1)], kv_cache_bytes=16 * MIB)
    large, small = made.replicas[0].shards
    assert (large.num_blocks, small.num_blocks) == (170, 170)  # of 96 KiB and 32 KiB
    assert (large.kv_bytes, small.kv_bytes) == (170 * 96 * 2**10, 170 * 32 * 2**10)


def test_the_cache_that_fits_a_small_rank_is_named_as_it_is_set() -> None:
    """The rank's own KV is a third of what the setting means for the largest rank."""
    large, small = plan(roomy(2), layouts=[cut_over(3, 1)]).replicas[0].shards
    fixed = small.weight_bytes + small.workspace_bytes + CPU_PROCESS_BYTES
    memory = fixed + small.kv_bytes // 2
    nodes = (roomy(1, name="a"), node(cpu(memory), memory_bytes=memory, name="b"))
    error = refused(*nodes, layouts=[cut_over(3, 1)])
    assert (error.field, error.value) == ("serving.kv_cache", "16 MiB")
    size = int(error.fix.split()[3]) * MIB
    assert 0.4 < size / large.kv_bytes <= 0.51
    assert plan(*nodes, layouts=[cut_over(3, 1)], kv_cache_bytes=size).replicas


def test_a_layout_that_cannot_be_cut_is_refused_by_its_place() -> None:
    with pytest.raises(InvalidConfig) as caught:
        plan(roomy(3), layouts=[cut_over(1), ReplicaLayout(stages=(StageLayout(devices=(1, 2), weights=(0, 0)),))])
    assert caught.value.field == "serving.parallelism.replicas[1].stages[0].tensor_split"


def test_ranks_that_share_sequences_hold_tokens_for_each_other() -> None:
    """Blocks take 128 KiB, and one rank has three quarters of each."""
    shared = ReplicaLayout(stages=(StageLayout(devices=(0, 1), weights=(3, 1), split="sequence"),))
    alone, together = (plan(roomy(2), layouts=[x], kv_cache_bytes=16 * MIB) for x in (cut_over(1), shared))
    large, small = together.replicas[0].shards
    assert alone.replicas[0].num_blocks == 128
    assert (large.num_blocks, small.num_blocks) == (170, 170)
    assert (large.kv_bytes, small.kv_bytes) == (170 * 96 * 2**10, 170 * 32 * 2**10)
    assert large.weight_bytes + small.weight_bytes > 1.5 * alone.replicas[0].leader.weight_bytes


def test_a_gpu_and_a_cpu_may_share_sequences() -> None:
    gpu = DeviceSpec(kind="cuda", memory_bytes=2**40)
    shared = ReplicaLayout(stages=(StageLayout(devices=(0, 1), weights=(1, 3), split="sequence"),))
    made = plan(roomy(1, name="a"), node(gpu, memory_bytes=2**40, name="b"), layouts=[shared])
    stripes = [shard.part.stripe for shard in made.replicas[0].shards]
    assert [stripe.stop - stripe.start for stripe in stripes if stripe is not None] == [4, 12]
