"""Which layout is used where none is asked for."""

import pytest

from placement.auto import Layouts, candidates, first_that_fits
from placement.errors import InvalidConfig, NotEnoughMemory
from placement.plan import Plan
from placement.planner import plan_replicas
from placement.specs import ClusterSpec, DeviceSpec, DType, NodeSpec
from tests.support.shapes import LLAMA_8B

GIB = 2**30


def node(*devices: tuple[int, int], name: str = "a") -> NodeSpec:
    """Of CPUs with so many threads, and so much memory in GiB."""
    specs = tuple(DeviceSpec(kind="cpu", num_threads=threads, memory_bytes=size * GIB) for threads, size in devices)
    return NodeSpec(name=name, host=name, memory_bytes=sum(size for _, size in devices) * GIB, devices=specs)


def plan(cluster: ClusterSpec, layouts: Layouts) -> Plan:
    return plan_replicas(
        LLAMA_8B, cluster, dtype=DType.BFLOAT16, block_size=16, kv_cache_bytes=GIB, max_context_tokens=4096,
        max_num_seqs=8, token_budget=256, layouts=layouts,
    )  # fmt: skip


def chosen(*nodes: NodeSpec) -> Layouts:
    cluster = ClusterSpec(nodes=nodes)
    return first_that_fits(cluster, lambda layouts: plan(cluster, layouts))[0]


def test_each_device_has_a_replica_where_that_fits() -> None:
    layouts = chosen(node((4, 32), (4, 32)))
    assert [layout.devices for layout in layouts] == [(0,), (1,)]


def test_a_model_that_fits_no_device_is_shared_by_all_of_a_node() -> None:
    """15 GiB of weights, by the threads of each."""
    (layout,) = chosen(node((6, 14), (2, 8)))
    (stage,) = layout.stages
    assert (stage.devices, stage.weights, stage.split) == ((0, 1), (6.0, 2.0), "tensor")


def test_nodes_share_the_layers_by_their_threads() -> None:
    (layout,) = chosen(node((6, 14)), node((1, 6), (1, 6), name="b"))
    first, second = layout.stages
    assert (first.devices, second.devices) == ((0,), (1, 2))
    assert first.speed == 3 * second.speed


def test_what_is_fast_and_small_gets_what_it_has_room_for() -> None:
    (layout,) = chosen(node((6, 7), (2, 14)))
    assert layout.stages[0].weights == (7.0 * GIB, 14.0 * GIB)


def test_where_nothing_fits_the_simplest_is_refused() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        chosen(node((4, 6), (4, 6)))
    assert caught.value.field == "model.path"


def test_too_large_a_cache_is_the_users_to_make_smaller() -> None:
    cluster = ClusterSpec(nodes=(node((4, 17), (4, 17)),))
    with pytest.raises(NotEnoughMemory) as caught:
        first_that_fits(
            cluster,
            lambda layouts: plan_replicas(
                LLAMA_8B, cluster, dtype=DType.BFLOAT16, block_size=16, kv_cache_bytes=8 * GIB,
                max_context_tokens=None, max_num_seqs=8, token_budget=256, layouts=layouts,
            ),
        )  # fmt: skip
    assert caught.value.field == "serving.kv_cache"


def test_what_is_wrong_whatever_the_layout_is_said_at_once() -> None:
    asked: list[Layouts] = []

    def refuse(layouts: Layouts) -> Plan:
        asked.append(layouts)
        raise InvalidConfig(field="model.max_context_tokens", value=1, problem="is wrong", fix="Right it.")

    with pytest.raises(InvalidConfig):
        first_that_fits(ClusterSpec(nodes=(node((4, 32), (4, 32)),)), refuse)
    assert len(asked) == 1


def test_threads_are_not_compared_with_gpus() -> None:
    gpu = DeviceSpec(kind="cuda", num_threads=1, memory_bytes=80 * GIB)
    cpu = DeviceSpec(kind="cpu", num_threads=64, memory_bytes=40 * GIB)
    cluster = ClusterSpec(nodes=(NodeSpec(name="a", host="a", memory_bytes=40 * GIB, devices=(gpu, cpu)),))
    _, together = candidates(cluster)
    assert together[0].stages[0].weights == (80.0 * GIB, 40.0 * GIB)
