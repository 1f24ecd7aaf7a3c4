"""Says why a Ray cluster has no room for workers, in words for the one who is to make some. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.planning.seating import NODE_ID_LABEL, Need, matches_labels

_KEYS = {"CPU": "lower threads", "GPU": "use device: cpu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """Says what a node that lives has, and what of it is free, by Ray's names for resources."""

    name: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]


def no_room(needs: Sequence[Need], nodes: Sequence[NodeResources]) -> str:
    """Returns why not all of ``needs`` found a place at once, and what to do about it."""
    for need in needs:
        problem = no_place(need, nodes)
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


def no_place(need: Need, nodes: Sequence[NodeResources]) -> str | None:
    """Returns why one worker alone would find no place, and what to do about it; None where it would find one."""
    fitting = [node for node in nodes if matches_labels(need.labels, node.labels)]
    if not fitting:
        return _no_such_node(need, nodes)
    for name in ("CPU", "GPU"):
        needed = _amount(need, name)
        if any(needed <= node.free.get(name, 0.0) for node in fitting):
            continue
        most = max(node.total.get(name, 0.0) for node in fitting)
        where = _where(need, fitting)
        if needed > most:
            largest = "it" if NODE_ID_LABEL in need.labels else "the largest"
            return f"{where} {_count(needed, name)}: {largest} has {most:g}. {_fix(name, stop=False)}"
        total = _total(fitting, name)
        reserved = total - _sum(fitting, name)
        said = f"{where} {_count(needed, f'free {name}')}: {reserved:g} of {total:g} are reserved by other jobs"
        return f"{said}. {_fix(name)}"
    if not any(all(_amount(need, name) <= node.free.get(name, 0.0) for name in _KEYS) for node in fitting):
        return f"no node has {_count(need.num_cpus, 'free CPU')} beside a free GPU. {_fix('GPU')}"
    return None


def _no_such_node(need: Need, nodes: Sequence[NodeResources]) -> str:
    labels = {key: value for key, value in need.labels.items() if key != NODE_ID_LABEL}
    there = ", ".join(node.name for node in nodes)
    if not labels:
        return f"the node that it was to run on has left the cluster. Start Ray there again, or use one of {there}"
    wanted = ", ".join(f"{key}: {value}" for key, value in sorted(labels.items()))
    fix = "Correct node_labels, or start a node that has them"
    said = "; ".join(f"{node.name} has {_own_labels(node)}" for node in nodes)
    return f"no live node has labels {{{wanted}}}{f' ({said})' if said else ''}. {fix}"


def _own_labels(node: NodeResources) -> str:
    """Writes the labels that people gave a node; Ray's own begin with its name."""
    own = {key: value for key, value in sorted(node.labels.items()) if not key.startswith("ray.io/")}
    return ", ".join(f"{key}={value}" for key, value in own.items()) or "none"


def _where(need: Need, fitting: Sequence[NodeResources]) -> str:
    if NODE_ID_LABEL in need.labels:
        return f"node {fitting[0].name} does not have"
    return "no node with its labels has" if need.labels else "no node has"


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
