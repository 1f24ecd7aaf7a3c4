"""Which layout to use where none is asked for: the first of a few simple ones that fits in memory.

The planner, which weighs layouts against each other by measured speed, is to take its place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from placement.errors import HeterodyneError, NotEnoughMemory
from placement.layout import ReplicaLayout, StageLayout, one_each
from placement.plan import Plan
from placement.specs import ClusterSpec, DeviceSpec

Layouts = tuple[ReplicaLayout, ...]


def first_that_fits(cluster: ClusterSpec, plan: Callable[[Layouts], Plan]) -> tuple[Layouts, Plan]:
    """A replica on each device, or, where the model is too large for that, one over all of them.

    Args:
        plan: makes the plan of layouts; raises NotEnoughMemory where it does not fit.

    Raises:
        NotEnoughMemory: nothing fits: what was wrong with a replica on each device.
        HeterodyneError: what else ``plan`` raises for that.
    """
    simplest, *others = candidates(cluster)
    try:
        return simplest, plan(simplest)
    except NotEnoughMemory as error:
        if error.field != "model.path":  # smaller KV blocks would do, which is for the user to say
            raise
        refused = error
    for layouts in others:
        with suppress(HeterodyneError):  # it does not fit either, or this model cannot be cut so
            return layouts, plan(layouts)
    raise refused


def candidates(cluster: ClusterSpec) -> Iterator[Layouts]:
    """From the simplest on: ranks of a node share every layer, nodes share the layers; by speed, then by memory."""
    yield one_each(cluster)
    devices = [device for node in cluster.nodes for device in node.devices]
    if len(devices) == 1:
        return
    if len({device.kind for device in devices}) == 1:  # threads of a CPU say nothing of a GPU
        yield _over_all(cluster, lambda device: float(device.num_threads))
    if all(device.memory_bytes for device in devices):
        yield _over_all(cluster, lambda device: float(device.memory_bytes))


def _over_all(cluster: ClusterSpec, weight: Callable[[DeviceSpec], float]) -> Layouts:
    stages: list[StageLayout] = []
    place = 0
    for node in cluster.nodes:
        weights = [weight(device) for device in node.devices]
        places: Sequence[int] = range(place, place + len(weights))
        stages.append(StageLayout(devices=tuple(places), weights=tuple(weights), speed=sum(weights)))
        place += len(weights)
    return (ReplicaLayout(stages=tuple(stages)),)
