"""Chooses a layout where none is asked for: the first of a few simple ones that fits in memory.

The first is a replica on each device; the second, for a model that is too large for that, one replica over all devices.
How much each device holds follows its measured speed, as far as its memory goes; where nothing was measured it follows
threads, and where that fails memory. The planner, which weighs layouts against each other by measured speed, is to take
its place.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from placement.errors import HeterodyneError, NotEnoughMemory
from placement.measured.speed import DeviceSpeed, shares_by_speed
from placement.model.specs import ClusterSpec
from placement.planning.layout import ReplicaLayout, StageLayout, one_each
from placement.planning.memory import CPU_PROCESS_BYTES, CUDA_PROCESS_BYTES
from placement.planning.plan import Plan, Shard
from placement.planning.room import fit

Layouts = tuple[ReplicaLayout, ...]
SplitBy = Literal["speed", "threads", "memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The layouts that were chosen, and their plan.

    Attributes:
        split_by: what the shares of devices are by; None: each device has a replica.
    """

    layouts: Layouts
    plan: Plan
    split_by: SplitBy | None = None


def first_that_fits(
    cluster: ClusterSpec,
    plan: Callable[[Layouts], Plan],
    *,
    draft: Callable[[Layouts], Plan],
    unmeasured: Collection[tuple[str, str]] = (),
    speeds: Sequence[DeviceSpeed] | None = None,
) -> Choice:
    """Plans a replica on each device, or, where the model is too large for that, one replica over all of them.

    Args:
        plan: makes the plan of layouts; raises NotEnoughMemory where it does not fit.
        draft: the same, whether it fits or not.
        unmeasured: (node, device) pairs whose memory is not known.
        speeds: of all devices, in the order of nodes and devices; None: they were not measured.

    Raises:
        NotEnoughMemory: nothing fits: what was wrong with a replica on each device, or, where a smaller KV cache would
            do for that alone, with the model cut over all.
        HeterodyneError: what else ``plan`` raises for that.
    """
    simplest = one_each(cluster)
    try:
        return Choice(layouts=simplest, plan=plan(simplest))
    except NotEnoughMemory as error:
        refused = error

    def fullness(weights: Sequence[float]) -> list[float]:
        (replica,) = draft(over_all(cluster, weights)).replicas
        return [_fullness(shard, unmeasured) for shard in replica.shards]

    for split_by, weights in shares(cluster, speeds):
        try:
            layouts = over_all(cluster, fit(weights, fullness))
            return Choice(layouts=layouts, plan=plan(layouts), split_by=split_by)
        except NotEnoughMemory as error:
            refused = easier(refused, error)
        except HeterodyneError:  # this model cannot be cut so
            continue
    raise refused


def easier(whole: NotEnoughMemory, cut: NotEnoughMemory) -> NotEnoughMemory:
    """Returns the refusal that is easier to mend, of a model that fits neither whole nor cut."""
    if whole.field != "model.path" or cut.field == "model.path":
        return whole
    problem = f"cut over all workers, of which none has room for the whole, {cut.problem}"
    return NotEnoughMemory(field=cut.field, value=cut.value, problem=problem, fix=cut.fix)


def shares(
    cluster: ClusterSpec, speeds: Sequence[DeviceSpeed] | None = None
) -> Iterator[tuple[SplitBy, tuple[float, ...]]]:
    """Yields shares of all devices and what they follow, the best first; nothing where there is one device."""
    devices = [device for node in cluster.nodes for device in node.devices]
    if len(devices) == 1:
        return
    if speeds is not None:
        assert len(speeds) == len(devices), (speeds, devices)
        yield "speed", shares_by_speed(speeds)
    if len({device.kind for device in devices}) == 1:  # threads of a CPU say nothing of a GPU
        yield "threads", tuple(float(device.num_threads) for device in devices)
    if all(device.memory_bytes for device in devices):
        yield "memory", tuple(float(device.memory_bytes) for device in devices)


def over_all(cluster: ClusterSpec, weights: Sequence[float]) -> Layouts:
    """Returns one replica over all devices: those of a node share every layer, and nodes share the layers."""
    stages: list[StageLayout] = []
    place = 0
    for node in cluster.nodes:
        places = range(place, place + len(node.devices))
        of_node = tuple(weights[device] for device in places)
        stages.append(StageLayout(devices=tuple(places), weights=of_node, speed=sum(of_node)))
        place += len(places)
    return (ReplicaLayout(stages=tuple(stages)),)


def _fullness(shard: Shard, unmeasured: Collection[tuple[str, str]]) -> float:
    """Returns a rank's need over its device's memory, both without the process itself; 0 where memory is not known."""
    device = shard.device
    if (shard.node, device.name) in unmeasured or not device.memory_bytes:
        return 0.0
    room = device.memory_bytes - (CPU_PROCESS_BYTES if device.kind == "cpu" else CUDA_PROCESS_BYTES)
    needed = shard.weight_bytes + shard.kv_bytes + shard.workspace_bytes
    return needed / room if room > 0 else math.inf
