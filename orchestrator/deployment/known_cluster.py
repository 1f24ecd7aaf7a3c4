"""Owns the cluster as far as it is known: which worker is on which machine, and how much memory each of them has.

On one machine everything is known. A Ray cluster that was there before is known once it is joined; until then a worker
shares a machine with another only where both name the same one.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from orchestrator.config.document import Config, WorkerConfig
from orchestrator.launcher.node import available_cores, available_memory_bytes, cpu_targets, has_gpu, named_target
from placement.measured.targets import chosen_target
from placement.model.specs import ClusterSpec, DeviceSpec, NodeSpec
from placement.planning.seating import NODE_ID_LABEL, Host

LOCAL_NODE = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Describes what this machine has to give.

    Attributes:
        has_gpu: False only where it has none for certain.
        targets: the targets that its CPU can execute, the fastest first; empty where they are not known.
        named_target: the one that the environment names; empty where it names none.
    """

    memory_bytes: int
    num_cores: int
    has_gpu: bool = True
    targets: tuple[str, ...] = ()
    named_target: str = ""

    @property
    def target(self) -> str:
        """Returns the target that workers here generate code for; empty where it is not known, or will be refused."""
        return chosen_target(self.named_target, self.targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCluster:
    """The cluster that a plan is made for.

    Attributes:
        workers: place in ``config.cluster.each_worker`` of each device's worker, in the order of nodes and devices.
    """

    spec: ClusterSpec
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """A machine and the places of its workers. Its memory is None, and its target empty, where it is not known."""

    name: str
    memory_bytes: int | None
    workers: tuple[int, ...]
    target: str = ""


def measure_machine() -> Machine:
    """Returns the memory that is free now and the cores this process may use, both within the container's limits."""
    return Machine(
        memory_bytes=available_memory_bytes(),
        num_cores=available_cores(),
        has_gpu=has_gpu(),
        targets=cpu_targets(),
        named_target=named_target(),
    )


def known_clusters(config: Config, machine: Machine, hosts: Sequence[Host] | None = None) -> tuple[KnownCluster, ...]:
    """Returns what the cluster may be, the likeliest first; a plan that fits one of them is not refused.

    Args:
        hosts: the machine of each worker in a cluster that was joined; None where that is not known.
    """
    workers = config.cluster.each_worker
    everyone = tuple(range(len(workers)))
    if config.cluster.is_local:
        here = _Node(name=LOCAL_NODE, memory_bytes=machine.memory_bytes, workers=everyone, target=machine.target)
        return (_known(config, machine, [here]),)
    if hosts is not None:
        return (_known(config, machine, _nodes_of(hosts)),)
    apart = _known(config, machine, _labelled(workers))
    together = _known(config, machine, [_Node(name="node-0", memory_bytes=None, workers=everyone)])
    return (apart, together) if len(apart.spec.nodes) > 1 else (apart,)


def without(cluster: KnownCluster, places: Collection[int]) -> KnownCluster:
    """Returns the cluster without some workers, by their places in the configuration."""
    nodes, workers, first = [], [], 0
    for node in cluster.spec.nodes:
        there = cluster.workers[first : first + len(node.devices)]
        first += len(node.devices)
        kept = [(device, place) for device, place in zip(node.devices, there, strict=True) if place not in places]
        if kept:
            nodes.append(replace(node, devices=tuple(device for device, _ in kept)))
            workers += [place for _, place in kept]
    return KnownCluster(spec=ClusterSpec(nodes=tuple(nodes)), workers=tuple(workers))


def seats_of(cluster: KnownCluster, places: Sequence[int]) -> tuple[tuple[NodeSpec, DeviceSpec], ...]:
    """Returns the machine and the device of each of these workers."""
    pairs = [(node, device) for node in cluster.spec.nodes for device in node.devices]
    found = dict(zip(cluster.workers, pairs, strict=True))
    return tuple(found[place] for place in places)


def _nodes_of(hosts: Sequence[Host]) -> list[_Node]:
    by_id = {host.host_id: host for host in hosts}
    names = [host.name for host in by_id.values()]
    return [
        _Node(
            name=host.name if names.count(host.name) == 1 else f"{host.name}-{host.host_id}",
            memory_bytes=host.memory_bytes,
            workers=tuple(worker for worker, there in enumerate(hosts) if there.host_id == host.host_id),
            target=host.target,
        )
        for host in by_id.values()
    ]


def _labelled(workers: Sequence[WorkerConfig]) -> list[_Node]:
    """Returns a machine for each worker, and one for all those that name the same one."""
    groups: dict[str, list[int]] = {}
    for place, worker in enumerate(workers):
        named = worker.node or worker.node_labels.get(NODE_ID_LABEL)
        groups.setdefault(named or f"worker {place}", []).append(place)
    return [
        _Node(name=workers[places[0]].node or f"node-{places[0]}", memory_bytes=None, workers=tuple(places))
        for places in groups.values()
    ]


def _known(config: Config, machine: Machine, nodes: Sequence[_Node]) -> KnownCluster:
    workers, names = config.cluster.each_worker, config.cluster.worker_names
    threads = max(1, machine.num_cores // max(1, sum(worker.device == "cpu" for worker in workers)))
    specs = [
        NodeSpec(
            name=node.name,
            memory_bytes=node.memory_bytes,
            devices=tuple(
                _device(workers[place], names[place], _memory(workers[place], node.memory_bytes), threads, node.target)
                for place in node.workers
            ),
        )
        for node in nodes
    ]
    return KnownCluster(
        spec=ClusterSpec(nodes=tuple(specs)),
        workers=tuple(place for node in nodes for place in node.workers),
    )


def _memory(worker: WorkerConfig, node_bytes: int | None) -> int | None:
    """Returns the memory that a worker may use; None where it is not known, as a GPU's is before its worker runs."""
    return worker.memory or (node_bytes if worker.device == "cpu" else None)


def _device(worker: WorkerConfig, name: str, memory_bytes: int | None, num_threads: int, cpu_target: str) -> DeviceSpec:
    kind, _, index = worker.device.partition(":")
    return DeviceSpec(
        kind="cuda" if kind == "cuda" else "cpu",
        index=int(index or 0),
        memory_bytes=memory_bytes,
        num_threads=worker.threads or num_threads,
        worker=name,
        target=cpu_target if worker.device == "cpu" else "cuda",
    )
