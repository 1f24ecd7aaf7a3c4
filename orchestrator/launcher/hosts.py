"""Asks a Ray cluster that was joined for its machines, and each machine for its free memory."""

import logging
import threading
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.launcher.no_room import NodeResources
from orchestrator.launcher.node import NodeFacts, node_facts
from orchestrator.launcher.ray_access import ray_cause
from placement.planning.seating import Host
from protos.codec.log_record import said

logger = logging.getLogger(__name__)

_ANSWER_S = 20.0
_POLL_S = 0.2


def find_hosts(stop: threading.Event) -> tuple[Host, ...]:
    """Returns the machines of the cluster that live, by name.

    A machine that does not answer within 20 s, or before ``stop`` is set, is returned without its memory and target.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes}
    facts = _node_facts(names, stop)
    hosts = [
        Host(
            host_id=node["NodeID"],
            name=node["NodeManagerHostname"],
            labels=node["Labels"],
            num_cpus=free.get(node["NodeID"], {}).get("CPU", 0.0),
            num_gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
            memory_bytes=facts[node["NodeID"]].memory_bytes if node["NodeID"] in facts else None,
            target=facts[node["NodeID"]].target if node["NodeID"] in facts else "",
            total_cpus=node["Resources"].get("CPU", 0.0),
            total_gpus=node["Resources"].get("GPU", 0.0),
            address=node["NodeManagerAddress"],
        )
        for node in nodes
    ]
    return tuple(sorted(hosts, key=lambda host: (host.name, host.host_id)))


def node_resources() -> tuple[NodeResources, ...]:
    """Returns what each node that lives has, and what of it is free."""
    free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return tuple(
        NodeResources(
            name=node["NodeManagerHostname"],
            labels=node["Labels"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    )


def _node_facts(names: Mapping[str, str], stop: threading.Event) -> dict[str, NodeFacts]:
    """Asks all machines at once, by id; the answer lacks one that is lost, or cannot run our code.

    Args:
        names: what people call each machine, by its id.
    """
    probe = ray.remote(num_cpus=0, max_retries=0)(node_facts)
    answers: dict[Any, str] = {}
    for host_id in names:
        there = NodeAffinitySchedulingStrategy(host_id, soft=False)
        answers[probe.options(scheduling_strategy=there).remote()] = host_id
    deadline = time.monotonic() + _ANSWER_S
    done: list[Any] = []
    late = list(answers)
    while late and not stop.is_set() and time.monotonic() < deadline:
        done, late = ray.wait(list(answers), num_returns=len(answers), timeout=_POLL_S)
    facts: dict[str, NodeFacts] = {}
    for answer in done:
        try:
            facts[answers[answer]] = ray.get(answer)
        except ray.exceptions.RayError as error:
            _memory_unknown(names[answers[answer]], ray_cause(error))
    for answer in late:
        if not stop.is_set():
            _memory_unknown(names[answers[answer]], f"no answer within {_ANSWER_S:g} s")
        ray.cancel(answer, force=True)
    return facts


@cache
def _memory_unknown(node: str, cause: str) -> None:
    """Says so once, as machines are asked again and again while room is looked for."""
    words = "How much memory is free on node %s is not known (%s). Is Heterodyne installed there?"
    logger.warning(words, node, cause, extra=said("host_memory_unknown", node=node, cause=cause))
