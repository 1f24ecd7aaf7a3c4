"""Refuses unequal shares of workers that could run on each other's machines. Pure."""

import itertools
from collections.abc import Iterator, Sequence

from orchestrator.config.document import Config
from orchestrator.config.parallelism import StageConfig
from placement.errors import InvalidConfig
from placement.planning.seating import Host, Need, could_swap

# The layers of the worker's stage, where they are given, and its part of the stage.
_Share = tuple[int | None, float]


def check_told_apart(config: Config, needs: Sequence[Need], hosts: Sequence[Host]) -> None:
    """Checks that no two workers with unequal shares could as well run on each other's machines.

    Args:
        needs: what each worker reserves, and the labels that its machine must carry.
        hosts: the machines that they may run on.

    Raises:
        InvalidConfig: nothing tells two workers apart. It says how to.
    """
    names = config.cluster.worker_names
    different = {host.host_id: host for host in hosts}.values()
    for one, other in unequal_pairs(config):
        if could_swap(needs[one], needs[other], tuple(different)):
            there = " or ".join(f"{host.name} ({host.address})" for host in different)
            raise InvalidConfig(
                field="cluster.workers",
                value=f"{names[one]}, {names[other]}",
                problem="have unequal shares, and nothing says which of them runs on which machine",
                fix=f"Give each of them a node: {there}. Labels of their machines, as node_labels, do as well.",
            )


def unequal_pairs(config: Config) -> Iterator[tuple[int, int]]:
    """Yields the places of any two workers of one replica that are asked to hold unequal shares."""
    parallelism = config.serving.parallelism
    places = {name: place for place, name in enumerate(config.cluster.worker_names)}
    for replica in () if parallelism is None else parallelism.replicas:
        shares = {places[name]: share for stage in replica.stages for name, share in _shares(stage)}
        for one, other in itertools.combinations(sorted(shares), 2):
            if shares[one] != shares[other]:
                yield one, other


def _shares(stage: StageConfig) -> Iterator[tuple[str, _Share]]:
    weights = stage.sequence_split or stage.tensor_split or (1.0,) * len(stage.workers)
    for name, weight in zip(stage.workers, weights, strict=True):
        yield name, (stage.layers, round(weight / (sum(weights) or 1.0), 6))
