"""Gives each worker a machine of a Ray cluster that was joined, and each rank the labels that keep it there."""

import threading
import time
from collections.abc import Sequence

from orchestrator.deployment.preflight import Checked
from orchestrator.errors import LaunchFailed
from orchestrator.launcher.hosts import find_hosts
from placement.planning.seating import NODE_ID_LABEL, Host, Need, need_of, seat

# What ended a moment ago counts as free only once its node has said so.
_SEAT_S = 5.0
_POLL_S = 0.2


def worker_needs(checked: Checked) -> list[Need]:
    """Returns what each worker reserves, in the order of the configuration."""
    workers = checked.config.cluster.each_worker
    devices = {
        checked.workers[replica.name, shard.rank]: shard.device
        for replica in checked.plan.replicas
        for shard in replica.shards
    }
    return [need_of(devices[place], worker.node_labels) for place, worker in enumerate(workers)]


def find_seats(needs: Sequence[Need], stop: threading.Event) -> tuple[Host, ...] | None:
    """Returns a machine for each worker; None where some worker finds no room for some seconds.

    Raises:
        LaunchFailed: ``stop`` was set before the end.
    """
    deadline = time.monotonic() + _SEAT_S
    while True:
        hosts = seat(needs, find_hosts(stop))
        if stop.is_set():
            raise LaunchFailed("stopped while machines were looked for")
        if hosts is not None or time.monotonic() > deadline:
            return hosts
        stop.wait(_POLL_S)


def rank_labels(checked: Checked) -> dict[tuple[str, int], dict[str, str]]:
    """Returns the labels that each rank's node must carry: those asked for, and that of the node it is planned for."""
    workers = checked.config.cluster.each_worker
    labels = {rank: dict(workers[worker].node_labels) for rank, worker in checked.workers.items()}
    if checked.hosts is not None:
        for rank, worker in checked.workers.items():
            labels[rank][NODE_ID_LABEL] = checked.hosts[worker].host_id
    return labels
