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
from placement.errors import InvalidConfig
from placement.planning.seating import NODE_ID_LABEL, Host, Need, need_of, pin, seat

# What ended a moment ago counts as free only once its node has said so.
_SEAT_S = 5.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Says where the workers of a deployment run.

    Attributes:
        needs: what each worker reserves, and the labels that its machine must carry.
        hosts: the machine of each worker; None where some worker found no room, so that Ray places them.
    """

    needs: tuple[Need, ...]
    hosts: tuple[Host, ...] | None


def worker_needs(checked: Checked) -> list[Need]:
    """Returns what each worker reserves, in the order of the configuration."""
    workers = checked.config.cluster.each_worker
    devices = {
        checked.workers[replica.name, shard.rank]: shard.device
        for replica in checked.plan.replicas
        for shard in replica.shards
    }
    return [need_of(devices[place], worker.node_labels) for place, worker in enumerate(workers)]


def find_seats(config: Config, needs: Sequence[Need], stop: threading.Event) -> Seats:
    """Finds a machine for each worker; it looks for some seconds where there is no room.

    Raises:
        InvalidConfig: a worker names a machine that is not there, or two have unequal shares and nothing tells on
            which machine each of them runs.
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
        except InvalidConfig:  # a machine may be about to join
            if is_late:
                raise
        else:
            seats = seat(pinned, hosts)
            if seats is not None or is_late:
                check_told_apart(config, pinned, hosts if seats is None else seats)
                return Seats(needs=pinned, hosts=seats)
        stop.wait(_POLL_S)


def pin_named(config: Config, needs: Sequence[Need], hosts: Sequence[Host]) -> tuple[Need, ...]:
    """Returns the needs, with those of workers that name a machine bound to it.

    Raises:
        InvalidConfig: no machine has that name, or several have.
    """
    workers = config.cluster.each_worker
    return tuple(
        need if worker.node is None else pin(need, _named(worker.node, hosts))
        for worker, need in zip(workers, needs, strict=True)
    )


def _named(name: str, hosts: Sequence[Host]) -> Host:
    found = [host for host in hosts if host.is_called(name)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(f"{host.name} ({host.address})" for host in hosts)
    problem = "is the name of several machines of the Ray cluster" if found else "is no machine of the Ray cluster"
    fix = f"Name one of {there}." if not found else f"Write its address: the machines are {there}."
    raise InvalidConfig(field="cluster.workers: node", value=name, problem=problem, fix=fix)


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
