"""Attention workers in a plan: all blocks are held, within memory, and as the weights say."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InvalidConfig, NotEnoughMemory
from placement.model.specs import ClusterSpec, DeviceSpec, DType, NodeSpec
from placement.planning.attention import NO_PART, AttentionSetup, held_bytes
from placement.planning.held import held
from placement.planning.layout import ReplicaLayout, StageLayout
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import CPU_PROCESS_BYTES
from placement.planning.plan import Plan, Role
from placement.planning.planner import plan_replicas
from placement.planning.pools import Pool
from placement.planning.residency import Partition
from tests.support.planning import MIB, MODEL

LIMITS = ReplicaLimits(block_size=16, token_budget=64, max_num_seqs=4)
ROOM = CPU_PROCESS_BYTES + 200 * MIB


def device(worker: str, memory_bytes: int | None = None) -> DeviceSpec:
    return DeviceSpec(kind="cpu", memory_bytes=memory_bytes, worker=worker)


def node(name: str, memory_bytes: int | None, *workers: str) -> NodeSpec:
    devices = tuple(device(worker, memory_bytes) for worker in workers)
    return NodeSpec(name=name, memory_bytes=memory_bytes, devices=devices)


def setup(*memories: int | None, weights: tuple[float, ...] | None = None, **more: object) -> AttentionSetup:
    """Attention workers on machines of their own."""
    nodes = [node(f"m{index}", memory, f"attention-{index}") for index, memory in enumerate(memories)]
    asked = AttentionSetup(
        places=tuple((each, each.devices[0]) for each in nodes), weights=weights or (1.0,) * len(nodes)
    )
    return replace(asked, **more)  # type: ignore[arg-type]


def planned(
    asked: AttentionSetup,
    *,
    num_replicas: int = 1,
    memory_bytes: int | None = ROOM,
    context: int | None = 256,
    layouts: tuple[ReplicaLayout, ...] | None = None,
    kv_cache_bytes: int | None = None,
) -> Plan:
    nodes = tuple(node(f"n{index}", memory_bytes, f"w{index}") for index in range(num_replicas))
    return plan_replicas(
        MODEL,
        ClusterSpec(nodes=nodes),
        dtype=DType.FLOAT32,
        kv_cache_bytes=kv_cache_bytes,
        max_context_tokens=context,
        limits=LIMITS,
        layouts=layouts,
        attention=asked,
    )


@settings(deadline=None)
@given(
    partition=st.sampled_from(Partition),
    memories=st.lists(
        st.none() | st.integers(1, 60).map(lambda size: CPU_PROCESS_BYTES + size * MIB), min_size=1, max_size=4
    ),
    speeds=st.lists(st.sampled_from([1.0, 1.5, 4.0, 11.0]), min_size=4, max_size=4),
    num_replicas=st.integers(1, 3),
    local=st.sampled_from([0, 2 * MIB, 5 * MIB]),
    setting=st.none() | st.integers(1, 40).map(lambda size: size * MIB),
)  # fmt: skip
def test_every_block_is_held_once_and_no_memory_is_exceeded(
    partition: Partition,
    memories: list[int | None],
    speeds: list[float],
    num_replicas: int,
    local: int,
    setting: int | None,
) -> None:
    asked = setup(
        *memories,
        weights=tuple(speeds[: len(memories)]),
        partition=partition,
        kv_cache_bytes=setting,
        local_kv_cache_bytes=local,
    )
    try:
        plan = planned(asked, num_replicas=num_replicas)
    except NotEnoughMemory as error:
        assert error.field in ("serving.attention.kv_cache", "model.path")
        return
    check(plan, asked)


def check(plan: Plan, asked: AttentionSetup) -> None:
    for replica in plan.replicas:
        assert replica.residency is not None
        assert replica.num_blocks == replica.residency.num_blocks >= -(-256 // LIMITS.block_size)
        for region in replica.residency.regions:
            cells = [
                (head, slot)
                for each in region.holders
                for head in range(each.kv_heads.start, each.kv_heads.stop)
                for slot in range(
                    *((0, LIMITS.block_size) if each.stripe is None else (each.stripe.start, each.stripe.stop))
                )
            ]
            whole = MODEL.num_kv_heads * LIMITS.block_size
            assert region.is_local or len(cells) == len(set(cells)) == whole
        assert {shard.num_blocks for shard in replica.shards} == {replica.residency.num_local_blocks}
    assert [shard.rank for shard in plan.attention] == list(range(len(plan.attention)))
    for shard in plan.attention:
        sizes = [
            held_bytes(each.residency, shard.rank, plan.model, each.dtype, LIMITS.block_size)
            for each in plan.replicas
            if each.residency is not None
        ]
        assert shard.kv_bytes == sum(sizes) > 0 and shard.part == NO_PART
        assert sum(each.num_bytes for each in held(plan, shard)) == shard.kv_bytes
        assert asked.kv_cache_bytes is None or shard.kv_bytes <= asked.kv_cache_bytes
        if shard.device.memory_bytes is not None:
            taken = shard.kv_bytes + shard.workspace_bytes + CPU_PROCESS_BYTES
            assert taken <= shard.device.memory_bytes


def test_heads_and_slots_and_requests_are_divided_as_the_workers_are_fast() -> None:
    asked = setup(None, None, weights=(3.0, 1.0))
    heads = planned(replace(asked, partition=Partition.KV_HEADS)).replicas[0].residency
    slots = planned(replace(asked, partition=Partition.TOKEN_RANGES)).replicas[0].residency
    requests = planned(replace(asked, partition=Partition.REQUESTS)).replicas[0].residency
    assert heads is not None and slots is not None and requests is not None
    assert [len(each.kv_heads) for each in heads.regions[0].holders] == [3, 1]
    assert [each.slots_per_block(16) for each in slots.regions[0].holders] == [12, 4]
    assert [[each.worker for each in region.holders] for region in requests.regions] == [[0], [1]]


def test_a_worker_that_gets_nothing_is_left_out_and_the_others_are_numbered_without_gaps() -> None:
    plan = planned(setup(None, None, None, weights=(8.0, 0.5, 8.0)))
    assert [(shard.rank, shard.device.worker) for shard in plan.attention] == [(0, "attention-0"), (1, "attention-2")]
    (residency,) = [replica.residency for replica in plan.replicas]
    assert residency is not None and residency.workers == (0, 1)


def test_model_ranks_keep_no_kv_or_the_local_blocks_and_rows_of_a_step_behind_them() -> None:
    (without,) = planned(setup(None)).replicas[0].shards
    (with_local,) = planned(setup(None, local_kv_cache_bytes=4 * MIB)).replicas[0].shards
    token_bytes = 2 * MODEL.num_layers * MODEL.num_kv_heads * MODEL.head_dim * 4
    assert (without.num_blocks, without.kv_bytes) == (0, LIMITS.token_budget * token_bytes // MODEL.num_layers)
    assert with_local.num_blocks == 4 * MIB // (16 * token_bytes)
    assert with_local.kv_bytes == (with_local.num_blocks * 16 + LIMITS.token_budget) * token_bytes


def test_a_model_fits_beside_no_kv_where_it_does_not_beside_one_sequence() -> None:
    tight = CPU_PROCESS_BYTES + 22 * MIB
    with pytest.raises(NotEnoughMemory):
        plan_replicas(
            MODEL,
            ClusterSpec(nodes=(node("n0", tight, "w0"),)),
            dtype=DType.FLOAT32,
            kv_cache_bytes=None,
            max_context_tokens=4096,
            limits=LIMITS,
        )
    plan = planned(setup(ROOM), memory_bytes=tight, context=4096)
    assert plan.model.max_context_tokens == 4096 and plan.replicas[0].num_kv_tokens >= 4096
    assert plan.replicas[0].kv_sized_by == "attention workers"


def test_prefill_replicas_keep_their_own_kv() -> None:
    layouts = tuple(
        ReplicaLayout(stages=(StageLayout(devices=(index,), weights=(1.0,)),), pool=Pool(role=role))
        for index, role in enumerate((Role.PREFILL, Role.DECODE))
    )
    prefill, decode = planned(setup(None), num_replicas=2, layouts=layouts, kv_cache_bytes=8 * MIB).replicas
    assert prefill.residency is None and prefill.num_blocks == prefill.shards[0].num_blocks > 0
    assert decode.residency is not None and decode.shards[0].num_blocks == 0


def test_ranks_that_share_sequences_are_refused() -> None:
    shared = ReplicaLayout(stages=(StageLayout(devices=(0, 1), weights=(1.0, 1.0), split="sequence"),))
    with pytest.raises(InvalidConfig) as caught:
        planned(setup(None), num_replicas=2, layouts=(shared,))
    assert caught.value.field == "serving.parallelism.replicas[0]" and "sequence_split" in caught.value.fix


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_cache_that_holds_no_sequence_is_refused_and_the_size_that_is_named_works(num_replicas: int) -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        planned(setup(None, None, kv_cache_bytes=MIB // 2), num_replicas=num_replicas)
    error = caught.value
    assert error.field == "serving.attention.kv_cache" and "one sequence may have 256" in error.problem
    assert f"Set it to {num_replicas} MiB or more" in error.fix
    assert planned(setup(None, None, kv_cache_bytes=num_replicas * MIB), num_replicas=num_replicas).attention


def test_a_cache_that_is_more_than_is_left_is_refused_with_what_is() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        planned(setup(CPU_PROCESS_BYTES + 20 * MIB, kv_cache_bytes=64 * MIB))
    error = caught.value
    assert error.field == "serving.attention.kv_cache" and error.value == "64 MiB"
    assert "that worker attention-0 has left for keys and values" in error.problem
    assert error.fix.startswith("Set it to 19 MiB or less, or free 4")


def test_a_local_cache_below_a_block_is_refused() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        planned(setup(None, local_kv_cache_bytes=1000))
    assert caught.value.field == "serving.attention.local_kv_cache" and "128 KiB" in caught.value.fix


def test_an_attention_worker_shares_the_memory_of_its_machine_with_a_rank_of_the_model() -> None:
    shared = NodeSpec(name="n0", memory_bytes=ROOM + 2 * CPU_PROCESS_BYTES, devices=(device("a"),))
    asked = AttentionSetup(places=((shared, shared.devices[0]),), weights=(1.0,))
    with pytest.raises(NotEnoughMemory):
        planned(asked, memory_bytes=2 * CPU_PROCESS_BYTES)  # the node as the model's ranks know it counts
    plan = planned(asked, memory_bytes=ROOM + CPU_PROCESS_BYTES)
    (rank,), (worker,) = plan.replicas[0].shards, plan.attention
    taken = sum(each.weight_bytes + each.kv_bytes + each.workspace_bytes + CPU_PROCESS_BYTES for each in (rank, worker))
    assert taken <= ROOM + CPU_PROCESS_BYTES
