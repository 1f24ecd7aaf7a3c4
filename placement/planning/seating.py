"""Decides which machine of a cluster each worker runs on, before anything is planned for the workers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.model.specs import DeviceSpec

NODE_ID_LABEL = "ray.io/node-id"
"""The label that Ray gives every node, with a value that no other node has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine that has joined the cluster, and what of it is free.

    Attributes:
        host_id: identifies the machine; the value of its label ``ray.io/node-id``.
        name: what people call the machine.
        memory_bytes: memory that can be allocated there now; None where the machine did not say.
    """

    host_id: str
    name: str
    labels: Mapping[str, str]
    num_cpus: float
    num_gpus: float
    memory_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a worker reserves of its machine, and the labels that the machine must carry."""

    num_cpus: int
    num_gpus: int
    labels: Mapping[str, str]


def need_of(device: DeviceSpec, labels: Mapping[str, str]) -> Need:
    """Returns what a worker on ``device`` reserves: its threads, or one GPU and the CPU that drives it."""
    if device.kind == "cpu":
        return Need(num_cpus=device.num_threads, num_gpus=0, labels=labels)
    return Need(num_cpus=1, num_gpus=1, labels=labels)


def seat(needs: Sequence[Need], hosts: Sequence[Host]) -> tuple[Host, ...] | None:
    """Assigns a machine to each worker, so that few machines are used and workers share one where they can.

    The machine that takes most of the workers gets them, then the machine that takes most of the rest. Workers whose
    labels allow the fewest machines go first.

    Returns:
        The machine of each worker; None where some worker finds no room that way.
    """
    suitable = [sum(_matches(need.labels, host.labels) for host in hosts) for need in needs]
    waiting = sorted(range(len(needs)), key=lambda worker: suitable[worker])
    seats: dict[int, Host] = {}
    unused = list(hosts)
    while waiting and unused:
        takes = [_those_that_fit(waiting, needs, host) for host in unused]
        most = max(range(len(unused)), key=lambda place: len(takes[place]))
        seats |= dict.fromkeys(takes[most], unused[most])
        waiting = [worker for worker in waiting if worker not in seats]
        del unused[most]
    return None if waiting else tuple(seats[worker] for worker in range(len(needs)))


def _those_that_fit(workers: Sequence[int], needs: Sequence[Need], host: Host) -> list[int]:
    fitting: list[int] = []
    num_cpus, num_gpus = host.num_cpus, host.num_gpus
    for worker in workers:
        need = needs[worker]
        if _matches(need.labels, host.labels) and need.num_cpus <= num_cpus and need.num_gpus <= num_gpus:
            fitting.append(worker)
            num_cpus -= need.num_cpus
            num_gpus -= need.num_gpus
    return fitting


def _matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(_meets(condition, labels.get(key)) for key, condition in selector.items())


def _meets(condition: str, value: str | None) -> bool:
    """Whether a label's value meets one condition of Ray's selectors: ``a``, ``!a``, ``in(a, b)`` or ``!in(a, b)``.

    A machine without the label meets none: where Ray is more generous, a worker waits for Ray's own choice.
    """
    wanted = condition.removeprefix("!")
    if wanted.startswith("in("):
        options = [option.strip() for option in wanted.removeprefix("in(").removesuffix(")").split(",")]
    else:
        options = [wanted]
    return value is not None and (value in options) != condition.startswith("!")
