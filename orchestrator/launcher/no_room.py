"""Says why a Ray cluster has no room for workers, in words for the one who is to make some. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.planning.seating import Need, matches_labels

_KEYS = {"CPU": "lower threads", "GPU": "use device: cpu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """What a node that lives has, and what of it is free, by Ray's names for resources."""

    name: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]


def no_room(needs: Sequence[Need], nodes: Sequence[NodeResources]) -> str:
    """Returns why not all of ``needs`` found a place at once, and what to do about it."""
    for need in needs:
        problem = _no_place(need, nodes)
        if problem is not None:
            return problem
    for name in ("CPU", "GPU"):
        needed, free, total = sum(_amount(need, name) for need in needs), _sum(nodes, name), _total(nodes, name)
        if needed > free:
            there = f"{free:g} of {total:g} are free"
            return f"the {len(needs)} workers need {needed:g} {name}s, and {there}. {_fix(name)}"
    return (
        f"each of the {len(needs)} workers would find room, but not all of them at once on these nodes. "
        "Lower threads or count in cluster.workers, or add a node"
    )


def _no_place(need: Need, nodes: Sequence[NodeResources]) -> str | None:
    """Says why one worker alone would find no place; None where it would."""
    fitting = [node for node in nodes if matches_labels(need.labels, node.labels)]
    if not fitting:
        wanted = ", ".join(f"{key}: {value}" for key, value in sorted(need.labels.items()))
        return f"no live node has labels {{{wanted}}}. Correct node_labels, or start a node that has them"
    for name in ("CPU", "GPU"):
        needed = _amount(need, name)
        if any(needed <= node.free.get(name, 0.0) for node in fitting):
            continue
        most = max(node.total.get(name, 0.0) for node in fitting)
        where = " with its labels" if need.labels else ""
        if needed > most:
            return f"no node{where} has {_count(needed, name)}: the largest has {most:g}. {_fix(name, stop=False)}"
        total = _total(fitting, name)
        reserved = total - _sum(fitting, name)
        said = (
            f"no node{where} has {_count(needed, f'free {name}')}: {reserved:g} of {total:g} are reserved by other jobs"
        )
        return f"{said}. {_fix(name)}"
    if not any(all(_amount(need, name) <= node.free.get(name, 0.0) for name in _KEYS) for node in fitting):
        return f"no node has {_count(need.num_cpus, 'free CPU')} beside a free GPU. {_fix('GPU')}"
    return None


def _amount(need: Need, name: str) -> int:
    return need.num_cpus if name == "CPU" else need.num_gpus


def _sum(nodes: Sequence[NodeResources], name: str) -> float:
    return sum(node.free.get(name, 0.0) for node in nodes)


def _total(nodes: Sequence[NodeResources], name: str) -> float:
    return sum(node.total.get(name, 0.0) for node in nodes)


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("s" if number != 1 else "")


def _fix(name: str, *, stop: bool = True) -> str:
    first = f"Stop another job, {_KEYS[name]}" if stop else _KEYS[name].capitalize()
    return f"{first}, or add a node"
