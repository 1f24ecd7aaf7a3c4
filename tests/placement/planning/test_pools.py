"""Checks plans whose replicas have roles, and block sizes and number types of their own."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import HeterodyneError, InvalidConfig, NotEnoughMemory
from placement.measured.speed import DeviceSpeed
from placement.model.specs import ClusterSpec, DeviceSpec, DType, NodeSpec
from placement.planning.auto import Choice, choose_layouts
from placement.planning.layout import ReplicaLayout, StageLayout
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import CPU_PROCESS_BYTES
from placement.planning.plan import Plan, Role
from placement.planning.planner import plan_replicas
from placement.planning.pools import EVERYONE, Pool
from tests.support.planning import MIB, MODEL, POOLS, layouts

LIMITS = ReplicaLimits(block_size=16, token_budget=64, max_num_seqs=4)
PREFILL = Pool(role=Role.PREFILL, block_size=32, dtype=DType.BFLOAT16)
DECODE = Pool(role=Role.DECODE)
GIB = 2**30


def cluster(*memory: int, nodes: int = 1) -> ClusterSpec:
    """Devices with so much memory each, dealt out to so many nodes in turn."""
    devices = [DeviceSpec(kind="cpu", memory_bytes=size, worker=f"w{at}") for at, size in enumerate(memory)]
    return ClusterSpec(
        nodes=tuple(
            NodeSpec(name=f"node-{at}", memory_bytes=None, devices=tuple(devices[at::nodes])) for at in range(nodes)
        )
    )


def plan(layouts: Sequence[ReplicaLayout], size: int = GIB, **more: object) -> Plan:
    num_devices = 1 + max(device for layout in layouts for device in layout.devices)
    settings = {"dtype": DType.FLOAT32, "kv_cache_bytes": 16 * MIB, "max_context_tokens": None, "limits": LIMITS} | more
    return plan_replicas(MODEL, cluster(*[size] * num_devices), layouts=layouts, **settings)


def on(*devices: int, pool: Pool = EVERYONE, split: str = "tensor") -> ReplicaLayout:
    stage = StageLayout(devices=devices, weights=(1.0,) * len(devices), split=split)
    return ReplicaLayout(stages=(stage,), pool=pool)


def choose(
    where: ClusterSpec, pools: Sequence[Pool], speeds: Sequence[DeviceSpeed] | None = None, kv: int | None = 16 * MIB
) -> Choice:
    make_plan = partial(
        plan_replicas, MODEL, dtype=DType.FLOAT32, kv_cache_bytes=kv, max_context_tokens=None, limits=LIMITS
    )
    return choose_layouts(make_plan, where, pools=pools, speeds=speeds)


def test_replicas_of_a_pool_have_its_role_its_block_size_and_its_number_type() -> None:
    made = plan([on(0, pool=PREFILL), on(1, pool=DECODE), on(2)])
    assert [replica.role for replica in made.replicas] == [Role.PREFILL, Role.DECODE, Role.MIXED]
    assert [replica.limits.block_size for replica in made.replicas] == [32, 16, 16]
    assert [replica.dtype for replica in made.replicas] == [DType.BFLOAT16, DType.FLOAT32, DType.FLOAT32]
    assert made.dtype is DType.FLOAT32 and made.has_roles
    assert not plan([on(0)]).has_roles


def test_memory_is_that_of_the_number_type_and_the_block_size_of_each() -> None:
    prefill, decode = (replica.leader for replica in plan([on(0, pool=PREFILL), on(1, pool=DECODE)]).replicas)
    assert prefill.weight_bytes < 0.6 * decode.weight_bytes
    # Blocks of twice the tokens in half the bytes are as large, so a pool of small numbers holds twice the context.
    assert prefill.num_blocks == decode.num_blocks and prefill.kv_bytes == decode.kv_bytes


def test_the_context_is_what_every_replica_holds() -> None:
    made = plan([on(0, pool=replace(PREFILL, dtype=None)), on(1, pool=DECODE)], kv_cache_bytes=5 * 2**17)
    assert [replica.num_kv_tokens for replica in made.replicas] == [64, 80]
    assert made.model.max_context_tokens == 64


def test_workers_of_one_node_hold_as_many_tokens_each_whatever_their_blocks() -> None:
    devices = tuple(DeviceSpec(kind="cpu", memory_bytes=600 * 2**21, num_threads=1) for _ in range(2))
    where = ClusterSpec(nodes=(NodeSpec(name="a", memory_bytes=600 * 2**21, devices=devices),))
    made = plan_replicas(
        replace(MODEL, max_context_tokens=2**17), where, dtype=DType.FLOAT32, kv_cache_bytes=None,
        max_context_tokens=None, limits=LIMITS,
        layouts=[on(0, pool=Pool(role=Role.PREFILL, block_size=64)), on(1, pool=DECODE)],
    )  # fmt: skip
    first, second = (replica.num_kv_tokens for replica in made.replicas)
    assert abs(first - second) < 64 and first > 1000


def test_a_share_that_leaves_no_slot_of_a_block_names_the_block_size_of_the_pool() -> None:
    shared = StageLayout(devices=(0, 1), weights=(9, 1), split="sequence")
    small = Pool(role=Role.DECODE, block_size=2)
    for pool, field in ((small, "serving.pools.decode.block_size"), (EVERYONE, "serving.block_size")):
        with pytest.raises(InvalidConfig, match=f"or raise {field}"):
            plan([ReplicaLayout(stages=(shared,), pool=pool)], limits=replace(LIMITS, block_size=2))
    assert plan([ReplicaLayout(stages=(shared,), pool=replace(small, block_size=16))]).replicas


@settings(max_examples=60, deadline=None)
@given(layouts(4))
def test_what_a_replica_holds_does_not_depend_on_the_pools_of_others(asked: tuple[ReplicaLayout, ...]) -> None:
    try:
        together = plan(asked)
    except HeterodyneError:
        return
    for layout, replica in zip(asked, together.replicas, strict=True):
        own = {"dtype": layout.pool.dtype or DType.FLOAT32, "limits": layout.pool.limits_of(LIMITS)}
        (alone,) = plan([replace(layout, pool=EVERYONE)], **own).replicas
        assert replica.stages == alone.stages
        assert (replica.limits, replica.dtype) == (alone.limits, alone.dtype)
        assert replica.role is layout.pool.role


def test_a_replica_on_each_device_takes_the_role_of_the_devices_pool() -> None:
    choice = choose(cluster(GIB, GIB, GIB), [DECODE, PREFILL, EVERYONE])
    assert [replica.role for replica in choice.plan.replicas] == [Role.DECODE, Role.PREFILL, Role.MIXED]
    assert [layout.devices for layout in choice.layouts] == [(0,), (1,), (2,)] and choice.split_by is None


def fitting(share: float) -> int:
    """Memory for this share of a replica that computes in float32."""
    (replica,) = plan([on(0)]).replicas
    leader = replica.leader
    return CPU_PROCESS_BYTES + int(share * (leader.weight_bytes + leader.kv_bytes + leader.workspace_bytes))


def test_a_pool_whose_workers_have_no_room_for_the_model_is_one_replica_and_others_stay_whole() -> None:
    small, large = fitting(0.8), GIB
    choice = choose(cluster(small, large, small, large), [DECODE, PREFILL, DECODE, PREFILL])
    assert [layout.devices for layout in choice.layouts] == [(0, 2), (1,), (3,)]
    assert [replica.role for replica in choice.plan.replicas] == [Role.DECODE, Role.PREFILL, Role.PREFILL]
    assert choice.split_by == "threads"


def test_shares_of_each_pool_follow_what_was_measured_and_its_nodes_share_the_layers() -> None:
    where = cluster(*[fitting(0.9)] * 3, GIB, nodes=2)
    speeds = [DeviceSpeed(weight_bytes_per_s=rate * 1e9, flops_per_s=1e9) for rate in (10, 30, 20, 10)]
    choice = choose(where, [DECODE, DECODE, DECODE, replace(PREFILL, dtype=None)], speeds)
    assert choice.split_by == "speed"
    decode, prefill = choice.layouts
    assert [(stage.devices, stage.speed) for stage in decode.stages] == [((0, 1), 40e9), ((2,), 20e9)]
    assert prefill.devices == (3,)


def test_pools_that_fit_alone_and_not_together_are_one_replica_each() -> None:
    """The memory of the node holds three copies of the model, and there are four devices."""
    (leader,) = (replica.leader for replica in plan([on(0)]).replicas)
    copy = leader.weight_bytes + leader.kv_bytes + leader.workspace_bytes
    memory = 4 * CPU_PROCESS_BYTES + 3 * copy
    devices = tuple(DeviceSpec(kind="cpu", memory_bytes=memory, num_threads=1, worker=f"w{i}") for i in range(4))
    where = ClusterSpec(nodes=(NodeSpec(name="a", memory_bytes=memory, devices=devices),))
    choice = choose(where, [DECODE, DECODE, EVERYONE, EVERYONE], kv=None)
    assert [layout.devices for layout in choice.layouts] == [(0, 1), (2, 3)]


def test_a_model_that_fits_no_pool_is_refused_with_what_would_do() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        choose(cluster(*[fitting(0.3)] * 3), [DECODE, DECODE, replace(PREFILL, dtype=None)])
    assert caught.value.remedies


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(POOLS), min_size=1, max_size=6),
    st.lists(st.sampled_from([0.4, 0.7, 1.1, 3.0]), min_size=6, max_size=6),
    st.integers(1, 3),
)
def test_each_device_serves_its_own_pool_and_no_other(
    pools: Sequence[Pool], share: Sequence[float], nodes: int
) -> None:
    sizes = [fitting(each) for each in share[: len(pools)]]
    where = cluster(*sizes, nodes=min(nodes, len(pools)))
    try:
        choice = choose(where, pools)
    except NotEnoughMemory:
        return
    devices = sorted(device for layout in choice.layouts for device in layout.devices)
    assert devices == list(range(len(pools)))
    for layout, replica in zip(choice.layouts, choice.plan.replicas, strict=True):
        assert {pools[device] for device in layout.devices} == {layout.pool}
        assert replica.role is layout.pool.role
