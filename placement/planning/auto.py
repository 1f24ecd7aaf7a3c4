"""Chooses a layout where none is asked for: the first of a few simple ones that fits in memory.

The simplest has a replica on each device. A model that is too large for that gets one replica over all devices, whose
shares follow their measured speed as far as their memory goes. Where nothing was measured the shares follow the number
of threads, and where that does not fit, the memory.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from placement.errors import HeterodyneError, NotEnoughMemory, Remedy
from placement.measured.speed import DeviceSpeed, shares_by_speed
from placement.model.specs import ClusterSpec
from placement.planning.layout import ReplicaLayout, StageLayout, one_each
from placement.planning.memory import CPU_PROCESS_BYTES, CUDA_PROCESS_BYTES
from placement.planning.plan import Plan, Shard
from placement.planning.remedies import followed, refusal
from placement.planning.room import fit

Layouts = tuple[ReplicaLayout, ...]
MakePlan = Callable[..., Plan]
"""Plans layouts on a cluster: :func:`placement.planning.planner.plan_replicas`, given all but these."""
SplitBy = Literal["speed", "threads", "memory"]


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


def choose_layouts(
    make_plan: MakePlan,
    cluster: ClusterSpec,
    *,
    speeds: Sequence[DeviceSpeed] | None = None,
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
    draft: Callable[[Layouts], Plan],
    works: Callable[[Remedy], bool],
    speeds: Sequence[DeviceSpeed] | None = None,
) -> Choice:
    """Chooses a replica on each device, or, where the model is too large for that, one over all of them.

    Args:
        plan: a function that makes the plan of layouts, and raises NotEnoughMemory where it does not fit.
        draft: a function that makes the plan whether it fits or not.
        works: a function that says whether some layout fits once a remedy was followed.
        speeds: the speeds of all devices, in the order of nodes and devices; None: they were not measured.

    Raises:
        NotEnoughMemory: nothing fits: see :func:`easier`.
        HeterodyneError: ``plan`` raises it for a replica on each device.
    """
    simplest = one_each(cluster)
    try:
        return Choice(layouts=simplest, plan=plan(simplest))
    except NotEnoughMemory as error:
        refused = error

    def fullness(weights: Sequence[float]) -> list[float]:
        return _fullnesses(draft(over_all(cluster, weights)))

    for split_by, weights in shares(cluster, speeds):
        try:
            layouts = over_all(cluster, fit(weights, fullness))
            return Choice(layouts=layouts, plan=plan(layouts), split_by=split_by)
        except NotEnoughMemory as error:
            refused = easier(refused, error, works)
        except HeterodyneError:  # this model cannot be cut so
            continue
    raise refused


def easier(whole: NotEnoughMemory, cut: NotEnoughMemory, works: Callable[[Remedy], bool]) -> NotEnoughMemory:
    """Chooses the error to report for a model that fits neither whole on each device nor cut over all of them.

    It is the error about the whole model, unless a smaller KV cache or context would let the model fit when it is cut
    over all devices. What follows memory is cut otherwise once that is changed, so each remedy is tried.
    """
    if whole.field != "model.path" or cut.field == "model.path":
        return whole
    remedies = [remedy for remedy in cut.remedies if works(remedy)]
    if not remedies:
        return whole
    problem = f"cut over all workers, of which none has room for the whole, {cut.problem}"
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


def over_all(cluster: ClusterSpec, weights: Sequence[float]) -> Layouts:
    """Lays one replica over all devices: the devices of a node share every layer, and the nodes share the layers."""
    stages: list[StageLayout] = []
    first = 0
    for node in cluster.nodes:
        devices = tuple(range(first, first + len(node.devices)))
        node_weights = tuple(weights[device] for device in devices)
        stages.append(StageLayout(devices=devices, weights=node_weights, speed=sum(node_weights)))
        first += len(devices)
    return (ReplicaLayout(stages=tuple(stages)),)


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
