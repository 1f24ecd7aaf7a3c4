"""Refuses pools and roles that contradict each other, or that leave prompts or answers to nobody."""

from collections.abc import Iterator, Mapping, Sequence, Set

from orchestrator.config.parallelism import ReplicaConfig
from orchestrator.config.pools import (
    NamedWorker,
    PoolsConfig,
    Selects,
    has_labels,
    members,
    pool_of_each,
    replica_pool,
)
from orchestrator.config.serving import ServingConfig
from orchestrator.config.source import Key, Layers
from placement.errors import InvalidConfig
from placement.planning.plan import Role
from placement.planning.pools import EVERYONE, Pool

_POOLS: Key = ("serving", "pools")
_REPLICAS: Key = ("serving", "parallelism", "replicas")
_MOST_NAMED = 8


def check_pools(serving: ServingConfig, workers: Sequence[NamedWorker], layers: Layers) -> list[InvalidConfig]:
    """Returns a refusal for each contradiction; where there is none, for what is missing to serve a request."""
    errors = list(_pool_errors(serving.pools, workers, layers))
    pool_of = pool_of_each(serving.pools, workers)
    replicas = () if serving.parallelism is None else serving.parallelism.replicas
    # A name that is unknown is refused elsewhere.
    known = [replica for replica in replicas if all(name in pool_of for name in _names(replica))]
    for number, replica in enumerate(replicas):
        if replica in known:
            errors += _replica_errors(replica, pool_of, layers, (*_REPLICAS, number))
    if errors or len(known) < len(replicas):
        return errors
    pools = [replica_pool(replica, pool_of) for replica in replicas] or list(pool_of.values())
    roles = {pool.role for pool in pools}
    errors += _never_errors(serving, roles, layers)
    return errors or list(_lacking(serving, roles, layers))


def _pool_errors(pools: PoolsConfig | None, workers: Sequence[NamedWorker], layers: Layers) -> Iterator[InvalidConfig]:
    """Yields what is wrong with who is in which pool."""
    if pools is None:
        return
    selected: dict[str, Role] = {}
    for role, pool in pools.each:
        where = (*_POOLS, role.value)
        names = members(pool, workers)
        unknown = list(unknown_names(pool, workers, layers, where))
        yield from unknown
        if pool.node_labels and not any(has_labels(pool, worker) for worker in workers):
            problem = "are not among the node_labels of any worker"
            fix = "Give workers these node_labels in cluster.workers, or name the pool's workers."
            yield layers.refusal((*where, "node_labels"), dict(pool.node_labels), problem, fix)
        elif not names and not unknown:
            fix = "Name its workers, as workers: [NAME], or labels that they have, as node_labels: {KEY: VALUE}."
            yield layers.refusal(where, None, "selects no worker", fix)
        for name in names:
            if name in selected:
                problem = f"selects a worker that serving.pools.{selected[name].value} selects too"
                yield layers.refusal(where, name, problem, "Put each worker into one pool at most.")
        selected |= dict.fromkeys(names, role)
    if pools.prefill is None and pools.decode is None:
        yield layers.refusal(_POOLS, None, "has no pool", "Add prefill: and decode:, or leave it out.")


def unknown_names(pool: Selects, workers: Sequence[NamedWorker], layers: Layers, where: Key) -> Iterator[InvalidConfig]:
    """Yields a refusal for each name that a selection has, and no worker."""
    names = list(dict.fromkeys(name for worker in workers for name in (worker.entry, worker.name) if name))
    for at, name in enumerate(pool.workers):
        if name not in names:
            fix = f"Use one of {', '.join(names[:_MOST_NAMED])}{', …' if len(names) > _MOST_NAMED else ''}."
            yield layers.refusal((*where, "workers", at), name, "is not the name of a worker", fix)


def _replica_errors(
    replica: ReplicaConfig, pool_of: Mapping[str, Pool], layers: Layers, where: Key
) -> Iterator[InvalidConfig]:
    """Yields what is wrong with the pools of a replica's workers, and with its role."""
    names = _names(replica)
    first = pool_of[names[0]]
    if other := next((name for name in names if pool_of[name] is not first), None):
        value = f"{names[0]} {_membership(first)}, {other} {_membership(pool_of[other])}"
        fix = "Put all workers of a replica into the same pool, or into none."
        yield layers.refusal(where, value, "has workers of different pools", fix)
    elif first is not EVERYONE and replica.role not in (None, first.role.value):
        problem = f"contradicts serving.pools.{first.role.value}, which has its workers"
        yield layers.refusal((*where, "role"), replica.role, problem, f"Write {first.role.value}, or leave it out.")


def _membership(pool: Pool) -> str:
    return "in none" if pool is EVERYONE else f"in {pool.role.value}"


def _never_errors(serving: ServingConfig, roles: Set[Role], layers: Layers) -> Iterator[InvalidConfig]:
    if serving.disaggregation == "never" and roles != {Role.MIXED}:
        problem = "has each replica compute prompts and answers, but some are for only one of the two"
        fix = "Set it to auto or always; or leave out serving.pools, and role in serving.parallelism."
        yield layers.refusal(("serving", "disaggregation"), "never", problem, fix)


def _lacking(serving: ServingConfig, roles: Set[Role], layers: Layers) -> Iterator[InvalidConfig]:
    """Yields what nobody would compute."""
    where = _REPLICAS if serving.pools is None else _POOLS
    if roles == {Role.PREFILL}:
        problem = "has every replica compute prompts only, so that nobody answers"
        yield layers.refusal(where, "prefill", problem, _more_fix("decode"))
    elif roles == {Role.DECODE}:
        problem = "has every replica compute answers only, so that nobody computes prompts"
        yield layers.refusal(where, "decode", problem, _more_fix("prefill"))
    elif serving.disaggregation == "always" and Role.PREFILL not in roles:
        problem = "has other replicas compute all prompts, and no replica is for prompts only"
        fix = f"{_more_fix('prefill', or_none=False)} Or set it to auto."
        yield layers.refusal(("serving", "disaggregation"), "always", problem, fix)


def _more_fix(role: str, *, or_none: bool = True) -> str:
    into = f"into serving.pools.{role}{', or into no pool' if or_none else ''}"
    roles = f"{role}{' or mixed' if or_none else ''}"
    return f"Put some workers {into}; with serving.parallelism, give a replica of them role: {roles}."


def _names(replica: ReplicaConfig) -> list[str]:
    return [name for stage in replica.stages for name in stage.workers]
