"""Gives each worker a machine of a Ray cluster that was joined, and each rank the labels that keep it there."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.document import Config
from orchestrator.deployment.preflight import Checked
from orchestrator.deployment.telling_apart import check_told_apart
from orchestrator.errors import LaunchFailed
from orchestrator.launcher.hosts import find_hosts
from orchestrator.launcher.no_room import NodeResources, no_place
from placement.errors import InvalidConfig
from placement.planning.seating import NODE_ID_LABEL, Host, Need, named, need_of, pin, seat

# What ended a moment ago counts as free only once its node has said so.
_SEAT_S = 5.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Says where the workers of a deployment run.

    Attributes:
        needs: what each worker reserves, and the labels that its machine must carry.
        hosts: the machine of each worker; None where some worker found no room, so that Ray places them.
        machines: all machines of the cluster.
    """

    needs: tuple[Need, ...]
    hosts: tuple[Host, ...] | None
    machines: tuple[Host, ...] = ()


def worker_needs(checked: Checked) -> list[Need]:
    """Returns what each worker reserves, in the order of the configuration."""
    workers = checked.config.cluster.each_worker
    devices = {
        checked.workers[replica.name, shard.rank]: shard.device
        for replica in checked.plan.replicas
        for shard in replica.shards
    }
    devices |= {} if checked.offloading is None else checked.offloading.devices  # of those that stay idle, too
    return [need_of(devices[place], worker.node_labels) for place, worker in enumerate(workers)]


def find_seats(config: Config, needs: Sequence[Need], stop: threading.Event, *, num_layers: int) -> Seats:
    """Finds a machine for each worker of a model of so many layers; it looks for some seconds where there is no room.

    Raises:
        InvalidConfig: a worker names a machine that is not there, no machine is large enough for a worker, or two have
            unequal shares and nothing tells on which machine each of them runs.
        LaunchFailed: ``stop`` was set before the end.
    """
    deadline = time.monotonic() + _SEAT_S
    while True:
        hosts = find_hosts(stop)
        if stop.is_set():
            raise LaunchFailed("stopped while machines were looked for")
        is_late = time.monotonic() > deadline
        try:
            pinned = pin_named(config, needs, hosts)
            check_large_enough(config, pinned, hosts)
        except InvalidConfig:  # a machine may be about to join
            if is_late:
                raise
        else:
            seats = seat(pinned, hosts)
            if seats is not None or is_late:
                check_told_apart(config, num_layers, pinned, hosts, seats)
                return Seats(needs=pinned, hosts=seats, machines=hosts)
        stop.wait(_POLL_S)


def pin_named(config: Config, needs: Sequence[Need], hosts: Sequence[Host]) -> tuple[Need, ...]:
    """Returns the needs, with those of workers that name a machine bound to it.

    Raises:
        InvalidConfig: no machine has that name, or several have.
    """
    entries = [(at, worker.node) for at, worker in enumerate(config.cluster.workers) for _ in range(worker.count)]
    return tuple(
        need if node is None else pin(need, _named(f"cluster.workers.{at}.node", node, hosts))
        for (at, node), need in zip(entries, needs, strict=True)
    )


def _named(field: str, name: str, hosts: Sequence[Host]) -> Host:
    found = named(name, hosts)
    if len(found) == 1:
        return found[0]
    if found:
        alike = len({host.address for host in found}) < len(found)
        there = ", ".join(host.host_id if alike else host.address for host in found)
        problem = "is the name of several machines of the Ray cluster"
        fix = f"Write {'the id' if alike else 'the address'} of one: {there}."
    else:
        there = ", ".join(f"{host.name} ({host.address})" for host in hosts)
        problem, fix = "is no machine of the Ray cluster", f"Name one of {there}."
    raise InvalidConfig(field=field, value=name, problem=problem, fix=fix)


def check_large_enough(config: Config, needs: Sequence[Need], hosts: Sequence[Host]) -> None:
    """Checks that some machine could take each worker if nothing else ran there.

    Raises:
        InvalidConfig: there is none for one of them.
    """
    nodes = [_as_if_free(host) for host in hosts]
    for name, need in zip(config.cluster.worker_names, needs, strict=True):
        if (problem := no_place(need, nodes)) is not None:
            said, _, fix = problem.partition(". ")
            raise InvalidConfig(field="cluster.workers", value=name, problem=f"finds no place: {said}", fix=f"{fix}.")


def _as_if_free(host: Host) -> NodeResources:
    total = {"CPU": host.total_cpus, "GPU": host.total_gpus}
    return NodeResources(name=host.name, labels={NODE_ID_LABEL: host.host_id, **host.labels}, total=total, free=total)


def crowded(config: Config, seats: Seats) -> tuple[Host, Sequence[Host]] | None:
    """Returns a machine that has all workers of a replica, and those that might have had some; None where none has.

    Workers that say where they run are where they are wanted.
    """
    hosts, parallelism = seats.hosts, config.serving.parallelism
    if hosts is None or parallelism is None:
        return None
    workers = config.cluster.each_worker
    places = {name: place for place, name in enumerate(config.cluster.worker_names)}
    for replica in parallelism.replicas:
        members = [places[name] for stage in replica.stages for name in stage.workers]
        movable = [place for place in members if workers[place].node is None and not workers[place].node_labels]
        here = {hosts[place].host_id: hosts[place] for place in members}
        if len(members) == 1 or not movable or len(here) > 1:
            continue
        others = [host for host in seats.machines if host.host_id not in here]
        if idle := [host for host in others if seat([seats.needs[movable[0]]], [host])]:
            return next(iter(here.values())), idle
    return None


def rank_labels(checked: Checked, needs: Sequence[Need]) -> dict[tuple[str, int], dict[str, str]]:
    """Returns the labels that each rank's node must carry: those asked for, and that of the node it is planned for.

    Args:
        needs: what each worker reserves, in the order of the configuration.
    """
    labels = {rank: dict(needs[worker].labels) for rank, worker in checked.workers.items()}
    if checked.hosts is not None:
        for rank, worker in checked.workers.items():
            labels[rank][NODE_ID_LABEL] = checked.hosts[worker].host_id
    return labels


def listening_host(config: Config, seats: Seats, here: str) -> str | None:
    """Returns the address that workers listen on: loopback where all are on this machine; None: each on its node's own.

    Args:
        here: the id of the machine that this process runs on.
    """
    if config.cluster.bind_host is not None:
        return config.cluster.bind_host
    hosts = seats.hosts
    is_here = hosts is not None and all(host.host_id == here for host in hosts)
    return "127.0.0.1" if config.cluster.is_local or is_here else None
