"""Refuses unequal shares or roles of workers that could run on each other's machines. Pure."""

import itertools
from collections.abc import Iterator, Sequence

from orchestrator.config.document import Config
from orchestrator.config.parallelism import ReplicaConfig, StageConfig
from orchestrator.config.pools import pool_of_each, replica_pool
from placement.errors import InvalidConfig
from placement.planning.seating import Host, Need, could_swap

# Whether workers share sequences, and the part of the model, or of the sequences, that a worker is asked to take.
_Share = tuple[bool, float]
_WHOLE: _Share = (False, 1.0)


def check_told_apart(
    config: Config, num_layers: int, needs: Sequence[Need], hosts: Sequence[Host], seats: Sequence[Host] | None
) -> None:
    """Checks that no two workers with unequal shares or roles could as well run on each other's machines.

    Args:
        num_layers: the layers of the model.
        needs: what each worker reserves, and the labels that its machine must carry.
        hosts: all machines.
        seats: the machine that each worker was given; None where that is left to Ray.

    Raises:
        InvalidConfig: nothing tells two workers apart. It says how to.
    """
    names = config.cluster.worker_names
    for one, other, differing in unequal_pairs(config, num_layers):
        there = hosts if seats is None else _different([seats[one], seats[other]])
        if could_swap(needs[one], needs[other], there):
            choices = " or ".join(f"{host.name} ({host.address})" for host in there)
            raise InvalidConfig(
                field="cluster.workers",
                value=f"{names[one]}, {names[other]}",
                problem=f"have {differing}, and nothing says which of them runs on which machine",
                fix=f"Give each of them a node: {choices}. Labels of their machines, as node_labels, do as well.",
            )


def _different(hosts: Sequence[Host]) -> Sequence[Host]:
    return tuple({host.host_id: host for host in hosts}.values())


def unequal_pairs(config: Config, num_layers: int) -> Iterator[tuple[int, int, str]]:
    """Yields the places of any two workers that are asked for unequal things, and says what is unequal.

    These are their shares of a model of so many layers, or the roles of their replicas.
    """
    parallelism, pools = config.serving.parallelism, pool_of_each(config.serving.pools, config.cluster.named_workers)
    shares = dict.fromkeys(pools, _WHOLE)
    roles = {name: pool.role for name, pool in pools.items()}
    for replica in () if parallelism is None else parallelism.replicas:
        for stage, part in zip(replica.stages, _parts(replica, num_layers), strict=True):
            shares |= dict(_shares(stage, part))
            roles |= dict.fromkeys(stage.workers, replica_pool(replica, pools).role)
    if len({(shares[name], roles[name]) for name in pools}) == 1:
        return
    for (one, name), (other, next_name) in itertools.combinations(enumerate(pools), 2):
        if shares[name] != shares[next_name]:
            yield one, other, "unequal shares"
        elif roles[name] is not roles[next_name]:
            yield one, other, "different roles"


def _parts(replica: ReplicaConfig, num_layers: int) -> list[float]:
    """Returns the part of the layers of each stage; those that do not say share the rest alike."""
    said = sum(stage.layers or 0 for stage in replica.stages)
    silent = sum(stage.layers is None for stage in replica.stages)
    rest = (num_layers - said) / silent if silent else 0.0
    return [(stage.layers or rest) / num_layers for stage in replica.stages]


def _shares(stage: StageConfig, part: float) -> Iterator[tuple[str, _Share]]:
    weights = stage.sequence_split or stage.tensor_split or (1.0,) * len(stage.workers)
    for name, weight in zip(stage.workers, weights, strict=True):
        yield name, (stage.sequence_split is not None, round(part * weight / (sum(weights) or 1.0), 6))
