"""What is said where a cluster has no room for workers."""

from collections.abc import Mapping

import pytest

from orchestrator.launcher.no_room import NodeResources, no_room
from placement.planning.seating import Need


def node(total: float, free: float, *, gpus: tuple[float, float] = (0, 0), **labels: str) -> NodeResources:
    return NodeResources(
        name="n", labels=labels, total={"CPU": total, "GPU": gpus[0]}, free={"CPU": free, "GPU": gpus[1]}
    )


def need(num_cpus: int = 1, num_gpus: int = 0, labels: Mapping[str, str] = {}) -> Need:
    return Need(num_cpus=num_cpus, num_gpus=num_gpus, labels=labels)


GPU = need(num_gpus=1)


@pytest.mark.parametrize(
    ("needs", "nodes", "said"),
    [
        (
            [need()], [node(2, 0)],
            "no node has 1 free CPU: 2 of 2 are reserved by other jobs. Stop another job, lower threads, or add a node",
        ),
        (
            [need(4)], [node(8, 3), node(4, 2)],
            "no node has 4 free CPUs: 7 of 12 are reserved by other jobs. "
            "Stop another job, lower threads, or add a node",
        ),
        ([need(64)], [node(8, 8), node(4, 2)], "no node has 64 CPUs: the largest has 8. Lower threads, or add a node"),
        (
            [GPU], [node(8, 8, gpus=(2, 0))],
            "no node has 1 free GPU: 2 of 2 are reserved by other jobs. "
            "Stop another job, use device: cpu, or add a node",
        ),
        ([GPU], [node(8, 8)], "no node has 1 GPU: the largest has 0. Use device: cpu, or add a node"),
        (
            [GPU], [node(8, 0, gpus=(1, 1)), node(8, 8, gpus=(1, 0))],
            "no node has 1 free CPU beside a free GPU. Stop another job, use device: cpu, or add a node",
        ),
        (
            [need(labels={"disk": "fast", "at": "b"})], [node(8, 8, at="a")],
            "no live node has labels {at: b, disk: fast} (n has at=a). Correct node_labels, or start a node that "
            "has them",
        ),
        (
            [need(2, labels={"at": "b"})], [node(8, 8, at="a"), node(2, 1, at="b")],
            "no node with its labels has 2 free CPUs: 1 of 2 are reserved by other jobs. "
            "Stop another job, lower threads, or add a node",
        ),
        (
            [need(2), need(2)], [node(4, 3)],
            "the 2 workers need 4 CPUs, and 3 of 4 are free. Stop another job, lower threads, or add a node",
        ),
        (
            [GPU, GPU], [node(8, 8, gpus=(2, 1))],
            "the 2 workers need 2 GPUs, and 1 of 2 are free. Stop another job, use device: cpu, or add a node",
        ),
        (
            [need(2), need(2), need(2)], [node(3, 3), node(3, 3)],
            "each of the 3 workers would find room, but not all of them at once on these nodes. "
            "Lower threads or count in cluster.workers, or add a node",
        ),
        ([need(labels={"at": "b"})], [], "no live node has labels {at: b}. Correct node_labels, or start a node that "
                                         "has them"),
    ],
)  # fmt: skip
def test_what_is_short_is_said_with_what_to_do(needs: list[Need], nodes: list[NodeResources], said: str) -> None:
    assert no_room(needs, nodes) == said
