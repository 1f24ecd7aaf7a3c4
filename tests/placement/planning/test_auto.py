"""Checks which layout is chosen where none is asked for."""

from collections.abc import Sequence
from functools import partial

import pytest

from placement.errors import InvalidConfig, NotEnoughMemory
from placement.measured.speed import DeviceSpeed
from placement.model.specs import ClusterSpec, DeviceSpec, DType, NodeSpec
from placement.planning.auto import Choice, Layouts, choose_layouts, first_that_fits, shares
from placement.planning.limits import ReplicaLimits
from placement.planning.plan import Plan
from placement.planning.planner import plan_replicas
from tests.support.shapes import LLAMA_8B

LIMITS = ReplicaLimits(block_size=16, token_budget=256, max_num_seqs=8)

GIB = 2**30


def node(*devices: tuple[int, int], name: str = "a") -> NodeSpec:
    """Makes a node of CPUs with these threads and this memory in GiB."""
    specs = tuple(DeviceSpec(kind="cpu", num_threads=threads, memory_bytes=size * GIB) for threads, size in devices)
    return NodeSpec(name=name, memory_bytes=sum(size for _, size in devices) * GIB, devices=specs)


def speeds(*gb_per_s: float) -> list[DeviceSpeed]:
    return [DeviceSpeed(weight_bytes_per_s=rate * 1e9, flops_per_s=1e9) for rate in gb_per_s]


def choose(
    cluster: ClusterSpec,
    *,
    measured: Sequence[DeviceSpeed] | None = None,
    kv_cache_bytes: int | None = GIB,
    max_context_tokens: int | None = 4096,
) -> Choice:
    make_plan = partial(
        plan_replicas, LLAMA_8B, dtype=DType.BFLOAT16, kv_cache_bytes=kv_cache_bytes,
        max_context_tokens=max_context_tokens, limits=LIMITS,
    )  # fmt: skip
    return choose_layouts(make_plan, cluster, speeds=measured)


def chosen(*nodes: NodeSpec, measured: Sequence[DeviceSpeed] | None = None) -> Layouts:
    return choose(ClusterSpec(nodes=nodes), measured=measured).layouts


def test_each_device_has_a_replica_where_that_fits() -> None:
    layouts = chosen(node((4, 32), (4, 32)))
    assert [layout.devices for layout in layouts] == [(0,), (1,)]


def test_a_model_that_fits_no_device_is_shared_by_all_of_a_node() -> None:
    """The model has 15 GiB of weights, which are shared by the threads of each device."""
    (layout,) = chosen(node((6, 14), (2, 8)))
    (stage,) = layout.stages
    assert (stage.devices, stage.weights, stage.split) == ((0, 1), (6.0, 2.0), "tensor")


def test_nodes_share_the_layers_by_their_threads() -> None:
    (layout,) = chosen(node((6, 14)), node((1, 6), (1, 6), name="b"))
    first, second = layout.stages
    assert (first.devices, second.devices) == ((0,), (1, 2))
    assert first.speed == 3 * second.speed


def test_what_is_measured_counts_and_not_the_threads() -> None:
    choice = choose(ClusterSpec(nodes=(node((6, 14), (2, 14)),)), measured=speeds(10, 30))
    assert choice.split_by == "speed"
    assert choice.layouts[0].stages[0].weights == (10e9, 30e9)


def test_nodes_share_the_layers_by_what_was_measured() -> None:
    (layout,) = chosen(node((6, 14)), node((1, 6), (1, 6), name="b"), measured=speeds(10, 3, 2))
    first, second = layout.stages
    assert (first.speed, second.speed) == (10e9, 5e9)
    assert second.weights == (3e9, 2e9)


def test_where_a_replica_fits_each_device_nothing_is_split_whatever_was_measured() -> None:
    choice = choose(ClusterSpec(nodes=(node((4, 32), (4, 32)),)), measured=speeds(1, 9))
    assert choice.split_by is None and len(choice.layouts) == 2


@pytest.mark.parametrize("measured", [None, speeds(60, 10, 10)], ids=["threads", "speed"])
def test_what_is_fast_and_small_gets_what_it_has_room_for(measured: Sequence[DeviceSpeed] | None) -> None:
    """The fast one holds no more than 7 GiB. The others are equally fast, and share the rest equally."""
    choice = choose(ClusterSpec(nodes=(node((6, 7), (1, 9), (1, 9)),)), measured=measured)
    assert choice.split_by == ("threads" if measured is None else "speed")
    first, *others = choice.plan.replicas[0].shards
    assert 4 * GIB < first.weight_bytes < 7 * GIB
    fast, *rest = choice.layouts[0].stages[0].weights
    assert rest[0] == pytest.approx(rest[1]) and fast < 6 * rest[0]
    assert others[0].weight_bytes == pytest.approx(others[1].weight_bytes, rel=0.1), "whole KV heads"


def test_layers_are_shared_within_memory() -> None:
    choice = choose(ClusterSpec(nodes=(node((1, 7)), node((1, 16), name="b"))), measured=speeds(30, 10))
    assert choice.split_by == "speed"
    small, large = choice.plan.replicas[0].shards
    assert small.weight_bytes < 7 * GIB < large.weight_bytes


def test_where_nothing_fits_the_simplest_is_refused() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        chosen(node((4, 6), (4, 6)))
    assert caught.value.field == "model.path"


def test_a_model_that_would_fit_with_a_smaller_cache_is_cut_so_that_it_fits_with_this_one() -> None:
    choice = choose(ClusterSpec(nodes=(node((4, 17), (4, 17)),)), kv_cache_bytes=4 * GIB, max_context_tokens=None)
    assert choice.split_by == "threads"


def test_too_large_a_cache_is_the_users_to_make_smaller() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        choose(ClusterSpec(nodes=(node((4, 17), (4, 17)),)), kv_cache_bytes=64 * GIB, max_context_tokens=None)
    assert caught.value.field == "serving.kv_cache" and "cut over" not in str(caught.value)


def test_of_a_cache_that_is_too_large_even_for_a_cut_model_the_cut_is_told() -> None:
    with pytest.raises(NotEnoughMemory, match=r"^serving.kv_cache: cut over all workers, .* needs .* or less.$"):
        choose(ClusterSpec(nodes=(node((4, 12), (4, 12)),)), kv_cache_bytes=8 * GIB, max_context_tokens=None)


def test_what_is_wrong_whatever_the_layout_is_said_at_once() -> None:
    asked: list[Layouts] = []

    def refuse(layouts: Layouts) -> Plan:
        asked.append(layouts)
        raise InvalidConfig(field="model.max_context_tokens", value=1, problem="is wrong", fix="Right it.")

    with pytest.raises(InvalidConfig):
        first_that_fits(ClusterSpec(nodes=(node((4, 32), (4, 32)),)), refuse, draft=refuse, works=lambda remedy: True)
    assert len(asked) == 1


def test_threads_are_not_compared_with_gpus() -> None:
    gpu = DeviceSpec(kind="cuda", num_threads=1, memory_bytes=80 * GIB)
    cpu = DeviceSpec(kind="cpu", num_threads=64, memory_bytes=40 * GIB)
    cluster = ClusterSpec(nodes=(NodeSpec(name="a", memory_bytes=40 * GIB, devices=(gpu, cpu)),))
    assert list(shares(cluster)) == [("memory", (80.0 * GIB, 40.0 * GIB))]
    assert next(shares(cluster, speeds(3000, 50))) == ("speed", (3000e9, 50e9))


def test_memory_divides_nothing_where_some_is_not_known() -> None:
    gpu = DeviceSpec(kind="cuda", num_threads=1, memory_bytes=None)
    cpu = DeviceSpec(kind="cpu", num_threads=64, memory_bytes=64 * GIB)
    cluster = ClusterSpec(nodes=(NodeSpec(name="a", memory_bytes=256 * GIB, devices=(gpu, cpu)),))
    assert list(shares(cluster)) == []
