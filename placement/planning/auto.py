"""Chooses a layout where none is asked for: the first of a few simple ones that fits in memory.

The simplest has a replica on each device. A model that is too large for that gets one replica over all devices, whose
shares follow their measured speed as far as their memory goes. Where nothing was measured the shares follow the number
of threads, and where that does not fit, the memory. Where there are pools, each has replicas of its own by this rule.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from placement.errors import HeterodyneError, NotEnoughMemory, Remedy
from placement.measured.speed import DeviceSpeed, shares_by_speed
from placement.model.specs import ClusterSpec
from placement.planning.layout import ReplicaLayout, StageLayout, one_each
from placement.planning.memory import CPU_PROCESS_BYTES, CUDA_PROCESS_BYTES
from placement.planning.plan import Plan, Shard
from placement.planning.pools import EVERYONE, Pool
from placement.planning.remedies import followed, refusal
from placement.planning.room import fit

Layouts = tuple[ReplicaLayout, ...]
MakePlan = Callable[..., Plan]
"""Plans layouts on a cluster: :func:`placement.planning.planner.plan_replicas`, given all but these."""
SplitBy = Literal["speed", "threads", "memory"]
Draft = Callable[[Layouts], Plan]
"""Plans layouts whether they fit or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The chosen layouts, and the plan that was made of them.

    Attributes:
        layouts: the layout of each replica.
        plan: the plan of these layouts.
        split_by: the quantity that the shares of devices follow; None: each device has a replica.
    """

    layouts: Layouts
    plan: Plan
    split_by: SplitBy | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The devices of a pool, in the order of the cluster's."""

    pool: Pool
    devices: tuple[int, ...]


def choose_layouts(
    make_plan: MakePlan,
    cluster: ClusterSpec,
    *,
    speeds: Sequence[DeviceSpeed] | None = None,
    pools: Sequence[Pool] | None = None,
) -> Choice:
    """Chooses the layouts of a cluster: see :func:`first_that_fits`, also for what is raised.

    Where no size of the KV cache is set, shares leave room for one sequence, and KV blocks get what is then left.
    """

    def choose(remedy: Remedy, works: Callable[[Remedy], bool]) -> Choice:
        given = followed(cluster, remedy)
        settings = {"kv_cache_bytes": remedy.kv_cache_bytes, "max_context_tokens": remedy.max_context_tokens}
        changes = {name: value for name, value in settings.items() if value is not None}
        return first_that_fits(
            given,
            lambda layouts: make_plan(given, layouts=layouts, **changes),
            draft=lambda layouts: make_plan(given, layouts=layouts, is_draft=True, **changes),
            works=works,
            speeds=speeds,
            pools=pools,
        )

    def works(remedy: Remedy) -> bool:
        try:
            return bool(choose(remedy, lambda further: False).layouts)
        except NotEnoughMemory:
            return False

    return choose(Remedy(), works)


def first_that_fits(
    cluster: ClusterSpec,
    plan: Callable[[Layouts], Plan],
    *,
    draft: Draft,
    works: Callable[[Remedy], bool],
    speeds: Sequence[DeviceSpeed] | None = None,
    pools: Sequence[Pool] | None = None,
) -> Choice:
    """Chooses a replica on each device, or, where the model is too large for that, one over all those of a pool.

    Args:
        plan: a function that makes the plan of layouts, and raises NotEnoughMemory where it does not fit.
        draft: a function that makes the plan whether it fits or not.
        works: a function that says whether some layout fits once a remedy was followed.
        speeds: the speeds of all devices, in the order of nodes and devices; None: they were not measured.
        pools: the pool of each device, likewise; None: none is in any.

    Raises:
        NotEnoughMemory: nothing fits: see :func:`easier`.
        HeterodyneError: ``plan`` raises it for a replica on each device.
    """
    simplest = _in_pools(one_each(cluster), pools)
    groups = _groups(simplest)
    try:
        return Choice(layouts=simplest, plan=plan(simplest))
    except NotEnoughMemory as error:
        refused = error

    among = "all workers" if len(groups) == 1 else "the workers of each pool"
    for cut in _cuts(groups, plan, simplest):
        for split_by, weights in shares(cluster, speeds):
            try:
                layouts = _lay(cluster, groups, cut, weights, draft)
                return Choice(layouts=layouts, plan=plan(layouts), split_by=split_by)
            except NotEnoughMemory as error:
                refused = easier(refused, error, works, among)
            except HeterodyneError:  # this model cannot be cut so
                continue
    raise refused


def _in_pools(layouts: Layouts, pools: Sequence[Pool] | None) -> Layouts:
    """Puts the replica on each device into the device's pool."""
    if pools is None:
        return layouts
    return tuple(replace(layout, pool=pool) for layout, pool in zip(layouts, pools, strict=True))


def _groups(each: Layouts) -> tuple[_Group, ...]:
    """Lists the pools by their first device, given the replica on each device."""
    devices: dict[Pool, list[int]] = {}
    for layout in each:
        devices.setdefault(layout.pool, []).extend(layout.devices)
    return tuple(_Group(pool=pool, devices=tuple(places)) for pool, places in devices.items())


def _cuts(groups: Sequence[_Group], plan: Callable[[Layouts], Plan], each: Layouts) -> Iterator[Sequence[_Group]]:
    """Yields the pools that are to have one replica: those where a replica on each device does not fit, then all.

    Pools that fit alone may not fit together, as CPUs of a node share its memory.
    """
    if len(groups) > 1:
        full = [group for group in groups if not _fits(plan, tuple(each[device] for device in group.devices))]
        if 0 < len(full) < len(groups):
            yield full
    yield groups


def _fits(plan: Callable[[Layouts], Plan], layouts: Layouts) -> bool:
    try:
        plan(layouts)
    except NotEnoughMemory:
        return False
    return True


def _lay(
    cluster: ClusterSpec, groups: Sequence[_Group], cut: Sequence[_Group], weights: Sequence[float], draft: Draft
) -> Layouts:
    """Lays one replica over all devices of the groups in ``cut``, within their memory, and one on each other device."""
    layouts: list[ReplicaLayout] = []
    for group in groups:
        if group in cut:
            layouts.append(_within_memory(cluster, group, [weights[device] for device in group.devices], draft))
        else:
            layouts += (over(cluster, (device,), (1.0,), group.pool) for device in group.devices)
    return tuple(sorted(layouts, key=lambda layout: layout.devices))


def _within_memory(cluster: ClusterSpec, group: _Group, weights: Sequence[float], draft: Draft) -> ReplicaLayout:
    def fullness(tried: Sequence[float]) -> list[float]:
        return _fullnesses(draft((over(cluster, group.devices, tried, group.pool),)))

    return over(cluster, group.devices, fit(weights, fullness), group.pool)


def easier(
    whole: NotEnoughMemory, cut: NotEnoughMemory, works: Callable[[Remedy], bool], among: str = "all workers"
) -> NotEnoughMemory:
    """Chooses the error to report for a model that fits neither whole on each device nor cut over several.

    It is the error about the whole model, unless a smaller KV cache or context would let the model fit when it is cut
    over them. What follows memory is cut otherwise once that is changed, so each remedy is tried.
    """
    if whole.field != "model.path" or cut.field == "model.path":
        return whole
    remedies = [remedy for remedy in cut.remedies if works(remedy)]
    if not remedies:
        return whole
    problem = f"cut over {among}, of which none has room for the whole, {cut.problem}"
    return refusal(field=cut.field, value=cut.value, problem=problem, remedies=remedies)


def shares(
    cluster: ClusterSpec, speeds: Sequence[DeviceSpeed] | None = None
) -> Iterator[tuple[SplitBy, tuple[float, ...]]]:
    """Yields shares of all devices, of any scale, the best first, with the quantity that they follow.

    It yields nothing where there is one device.
    """
    devices = [device for node in cluster.nodes for device in node.devices]
    if len(devices) == 1:
        return
    if speeds is not None:
        assert len(speeds) == len(devices), (speeds, devices)
        yield "speed", shares_by_speed(speeds)
    if len({device.kind for device in devices}) == 1:  # threads of a CPU say nothing of a GPU
        yield "threads", tuple(float(device.num_threads) for device in devices)
    memory_bytes = [float(device.memory_bytes) for device in devices if device.memory_bytes]
    if len(memory_bytes) == len(devices):  # what is not known divides nothing
        yield "memory", tuple(memory_bytes)


def over(
    cluster: ClusterSpec, devices: Sequence[int], weights: Sequence[float], pool: Pool = EVERYONE
) -> ReplicaLayout:
    """Lays one replica over devices: those of a node share every layer, and the nodes share the layers."""
    weight_of = dict(zip(devices, weights, strict=True))
    stages: list[StageLayout] = []
    first = 0
    for node in cluster.nodes:
        here = tuple(device for device in range(first, first + len(node.devices)) if device in weight_of)
        first += len(node.devices)
        if here:
            shares_here = tuple(weight_of[device] for device in here)
            stages.append(StageLayout(devices=here, weights=shares_here, speed=sum(shares_here)))
    return ReplicaLayout(stages=tuple(stages), pool=pool)


def _fullnesses(plan: Plan) -> list[float]:
    (replica,) = plan.replicas
    return [_fullness(shard) for shard in replica.shards]


def _fullness(shard: Shard) -> float:
    """Divides what a rank needs by what its device has, without its process in both; 0 where that is not known."""
    device = shard.device
    if device.memory_bytes is None:
        return 0.0
    room = device.memory_bytes - (CPU_PROCESS_BYTES if device.kind == "cpu" else CUDA_PROCESS_BYTES)
    needed = shard.weight_bytes + shard.kv_bytes + shard.workspace_bytes
    return needed / room if room > 0 else math.inf
