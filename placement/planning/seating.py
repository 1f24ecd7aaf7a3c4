"""Decides which machine of a cluster each worker runs on, before anything is planned for the workers."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from placement.model.specs import DeviceSpec

NODE_ID_LABEL = "ray.io/node-id"
"""The label that Ray gives every node, with a value that no other node has."""

# Bounds of the search for a seating where filling one machine after the other finds none.
_MOST_SEARCHED = 16
_MOST_STEPS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine that has joined the cluster, and what of it is free.

    Attributes:
        host_id: identifies the machine; the value of its label ``ray.io/node-id``.
        name: what people call the machine, which is its hostname.
        address: where other machines reach it.
        memory_bytes: memory that can be allocated there now; None where the machine did not say.
        total_cpus, total_gpus: what the machine has, free or not.
        target: the target that workers on its CPU compute for; empty where the machine did not say.
    """

    host_id: str
    name: str
    labels: Mapping[str, str]
    num_cpus: float
    num_gpus: float
    memory_bytes: int | None
    total_cpus: float
    total_gpus: float
    address: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Describes what a worker reserves of its machine, and the labels that the machine must carry."""

    num_cpus: int
    num_gpus: int
    labels: Mapping[str, str]


def need_of(device: DeviceSpec, labels: Mapping[str, str]) -> Need:
    """Returns what a worker on ``device`` reserves: its threads, or one GPU and the CPU that drives it."""
    if device.kind == "cpu":
        return Need(num_cpus=device.num_threads, num_gpus=0, labels=labels)
    return Need(num_cpus=1, num_gpus=1, labels=labels)


def pin(need: Need, host: Host) -> Need:
    """Returns the same need of that machine alone."""
    return replace(need, labels={**need.labels, NODE_ID_LABEL: host.host_id})


def named(name: str, hosts: Sequence[Host]) -> list[Host]:
    """Returns the machines that ``name`` stands for: an id, a hostname, an address, or a hostname without its domain.

    The first of these that some machine has counts.
    """
    for of in (lambda host: host.host_id, lambda host: host.name, lambda host: host.address, _short_name):
        if found := [host for host in hosts if of(host) == name]:
            return found
    return []


def _short_name(host: Host) -> str:
    return host.name.partition(".")[0]


def could_swap(one: Need, other: Need, hosts: Sequence[Host]) -> bool:
    """Returns whether two workers could run on two of the machines either way round, once these are free."""
    return any(
        all(_fits(need, host, host.total_cpus, host.total_gpus) for need in (one, other) for host in pair)
        for pair in itertools.combinations(hosts, 2)
    )


def seat(needs: Sequence[Need], hosts: Sequence[Host]) -> tuple[Host, ...] | None:
    """Assigns a machine to each worker, so that few machines are used and workers share one where they can.

    The workers with the least choice of machines go first. The machine that has room for most of the workers gets
    them, then the machine that has room for most of the rest. Where that leaves a worker over, up to 16 workers are
    searched for any seating at all.

    Returns:
        The machine of each worker; None where no seating was found. For a few workers and machines there is none then;
        for more than 16 workers, or where the search was given up after 10000 steps, there may be one.
    """
    choices = [sum(_fits(need, host, host.num_cpus, host.num_gpus) for host in hosts) for need in needs]
    order = sorted(range(len(needs)), key=lambda i: (choices[i], -needs[i].num_gpus, -needs[i].num_cpus))
    seats = _greedy(order, needs, hosts)
    if seats is None and all(choices) and len(needs) <= _MOST_SEARCHED:
        seats = _Search([needs[worker] for worker in order], hosts).run(order)
    return None if seats is None else tuple(seats[worker] for worker in range(len(needs)))


def _greedy(order: Sequence[int], needs: Sequence[Need], hosts: Sequence[Host]) -> dict[int, Host] | None:
    """Fills one machine after the other, each time the one that has room for most of the workers that are left."""
    waiting = list(order)
    seats: dict[int, Host] = {}
    unused = list(hosts)
    while waiting and unused:
        fitting = [_those_that_fit(waiting, needs, host) for host in unused]
        most = max(range(len(unused)), key=lambda place: len(fitting[place]))
        seats |= dict.fromkeys(fitting[most], unused[most])
        waiting = [worker for worker in waiting if worker not in seats]
        del unused[most]
    return None if waiting else seats


def _those_that_fit(workers: Sequence[int], needs: Sequence[Need], host: Host) -> list[int]:
    fitting: list[int] = []
    num_cpus, num_gpus = host.num_cpus, host.num_gpus
    for worker in workers:
        need = needs[worker]
        if _fits(need, host, num_cpus, num_gpus):
            fitting.append(worker)
            num_cpus -= need.num_cpus
            num_gpus -= need.num_gpus
    return fitting


class _Search:
    """Looks for any seating of workers, depth first: each worker tries every machine, those in use before the others.

    What is free once some workers have a seat decides whether the rest can have one, so each such state that led
    nowhere is remembered, and workers that are alike do not change places in vain.
    """

    def __init__(self, needs: Sequence[Need], hosts: Sequence[Host]) -> None:
        self._needs = needs
        self._hosts = hosts
        self._free = [(host.num_cpus, host.num_gpus) for host in hosts]
        self._places: list[int] = []
        self._dead_ends: set[tuple[tuple[float, float], ...]] = set()
        self._steps = 0

    def run(self, workers: Sequence[int]) -> dict[int, Host] | None:
        """Returns the machine of each of ``workers``, whose needs are in the same order; None where none was found."""
        if not self._seat_rest():
            return None
        return {worker: self._hosts[place] for worker, place in zip(workers, self._places, strict=True)}

    def _seat_rest(self) -> bool:
        if len(self._places) == len(self._needs):
            return True
        state = ((len(self._places), 0), *self._free)
        self._steps += 1
        if state in self._dead_ends or self._steps > _MOST_STEPS:
            return False
        need = self._needs[len(self._places)]
        for place in sorted(range(len(self._hosts)), key=lambda place: place not in self._places):
            num_cpus, num_gpus = before = self._free[place]
            if _fits(need, self._hosts[place], num_cpus, num_gpus):
                self._free[place] = (num_cpus - need.num_cpus, num_gpus - need.num_gpus)
                self._places.append(place)
                if self._seat_rest():
                    return True
                self._places.pop()
                self._free[place] = before
        self._dead_ends.add(state)
        return False


def _fits(need: Need, host: Host, num_cpus: float, num_gpus: float) -> bool:
    """Tells whether a worker may run on ``host`` and finds room in what is free of it."""
    return need.num_cpus <= num_cpus and need.num_gpus <= num_gpus and matches_labels(need.labels, host.labels)


def matches_labels(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Tells whether a node's labels meet every condition of a selector."""
    return all(_meets(condition, labels.get(key)) for key, condition in selector.items())


def _meets(condition: str, value: str | None) -> bool:
    """Tells whether a label's value meets a condition of Ray's selectors: ``a``, ``!a``, ``in(a, b)`` or ``!in(a, b)``.

    A machine without the label meets none: where Ray is more generous, a worker waits for Ray's own choice.
    """
    wanted = condition.removeprefix("!")
    if wanted.startswith("in("):
        options = [option.strip() for option in wanted.removeprefix("in(").removesuffix(")").split(",")]
    else:
        options = [wanted]
    return value is not None and (value in options) != condition.startswith("!")
