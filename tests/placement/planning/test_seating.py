"""Which machine of a cluster each worker runs on."""

import itertools
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.model.specs import DeviceSpec
from placement.planning import seating
from placement.planning.seating import Host, Need, need_of, seat


def host(name: str, num_cpus: float = 8, num_gpus: float = 0, **labels: str) -> Host:
    return Host(
        host_id=name, name=name, labels=labels, num_cpus=num_cpus, num_gpus=num_gpus, memory_bytes=None,
        total_cpus=num_cpus, total_gpus=num_gpus,
    )  # fmt: skip


def cpu(num_threads: int, **labels: str) -> Need:
    return need_of(DeviceSpec(kind="cpu", memory_bytes=0, num_threads=num_threads), labels)


def gpu(**labels: str) -> Need:
    return need_of(DeviceSpec(kind="cuda", memory_bytes=0), labels)


def names(needs: Sequence[Need], *hosts: Host) -> list[str] | None:
    seats = seat(needs, hosts)
    return None if seats is None else [each.name for each in seats]


def test_two_gpus_of_one_machine_are_used_together() -> None:
    assert names([gpu(), gpu()], host("a", num_gpus=1), host("b", num_gpus=2)) == ["b", "b"]


def test_workers_that_one_machine_cannot_take_go_to_as_few_as_can() -> None:
    machines = host("a", num_gpus=1), host("b", num_gpus=2), host("c", num_gpus=2)
    assert names([gpu()] * 4, *machines) == ["b", "b", "c", "c"]


def test_a_gpu_takes_a_cpu_beside_it() -> None:
    assert names([gpu(), cpu(8)], host("a", num_cpus=8, num_gpus=1)) is None
    assert names([gpu(), cpu(7)], host("a", num_cpus=8, num_gpus=1)) == ["a", "a"]


def test_labels_are_kept_and_who_has_the_least_choice_goes_first() -> None:
    machines = host("a", num_cpus=4, kind="small"), host("b", num_cpus=4, kind="big")
    assert names([cpu(2), cpu(4, kind="small"), cpu(2)], *machines) == ["b", "a", "b"]
    assert names([cpu(4), cpu(4, kind="small")], *machines) == ["b", "a"]


def test_what_finds_no_room_is_left_to_ray() -> None:
    assert names([cpu(9)], host("a"), host("b")) is None
    assert names([cpu(1, zone="x")], host("a", zone="y"), host("b")) is None
    assert names([cpu(1)]) is None


@pytest.mark.parametrize(
    ("condition", "found"),
    [("x", ["a"]), ("!x", ["b"]), ("in(x, z)", ["a"]), ("!in(x,z)", ["b"]), ("in(y)", ["b"]), ("w", None)],
)
def test_conditions_are_read_as_ray_reads_them(condition: str, found: list[str] | None) -> None:
    machines = host("none"), host("a", zone="x"), host("b", zone="y")
    assert names([cpu(1, zone=condition)], *machines) == found


@pytest.mark.parametrize(
    ("needs", "machines"),
    [
        ([cpu(1)] * 3 + [gpu()] * 2, (host("gpu", 3, 2), host("cpu", 3))),
        ([cpu(3), gpu(), gpu()], (host("gpu", 4, 2), host("cpu", 4))),
        ([cpu(4), cpu(4), gpu()], (host("gpu", 8, 1), host("cpu", 8))),
        ([cpu(2)] * 3 + [cpu(3)] * 2, (host("a", 6), host("b", 6))),
    ],
)
def test_who_could_go_elsewhere_leaves_room_for_who_cannot(needs: list[Need], machines: tuple[Host, ...]) -> None:
    for some in itertools.permutations(needs):
        for there in itertools.permutations(machines):
            seats = seat(some, there)
            assert seats is not None and has_room(some, seats, there)


def test_a_search_ends_where_there_is_too_much_to_try() -> None:
    sizes = [100 + 7**i % 61 for i in range(16)]
    machines = [host(str(i), sum(sizes) // 4 - 1) for i in range(4)]
    search = seating._Search([cpu(size) for size in sizes], machines)
    assert search.run(range(16)) is None and 10_000 < search._steps < 100_000
    assert names([cpu(size) for size in sizes], *machines) is None
    assert names([cpu(2)] * 40, *(host(str(i), 9) for i in range(10))) is not None


_LABELS = st.sampled_from([{}, {"kind": "big"}, {"kind": "small"}])
_WORKERS = st.tuples(st.integers(1, 4), st.booleans(), _LABELS)
_MACHINES = st.tuples(st.integers(0, 8), st.integers(0, 3), _LABELS)
Worker = tuple[int, bool, Mapping[str, str]]
Machine = tuple[int, int, Mapping[str, str]]


def drawn(workers: list[Worker], machines: list[Machine]) -> tuple[list[Need], list[Host]]:
    needs = [gpu(**labels) if is_gpu else cpu(threads, **labels) for threads, is_gpu, labels in workers]
    return needs, [host(str(i), cpus, gpus, **labels) for i, (cpus, gpus, labels) in enumerate(machines)]


def has_room(needs: Sequence[Need], seats: Sequence[Host], hosts: Sequence[Host]) -> bool:
    """Whether no machine is promised twice, and each has the labels that are asked for."""
    assert len(seats) == len(needs) and all(any(each is there for there in hosts) for each in seats)
    for each in hosts:
        there = [need for need, taken in zip(needs, seats, strict=True) if taken is each]
        if sum(need.num_cpus for need in there) > each.num_cpus or sum(need.num_gpus for need in there) > each.num_gpus:
            return False
        if not all(need.labels.items() <= each.labels.items() for need in there):
            return False
    return True


@given(st.lists(_WORKERS, min_size=1, max_size=5), st.lists(_MACHINES, max_size=3))
@settings(max_examples=400, deadline=None)
def test_workers_of_a_small_cluster_are_seated_wherever_that_is_possible(
    workers: list[Worker], machines: list[Machine]
) -> None:
    needs, hosts = drawn(workers, machines)
    seats = seat(needs, hosts)
    if seats is None:
        assert not any(has_room(needs, some, hosts) for some in itertools.product(hosts, repeat=len(needs)))
    else:
        assert has_room(needs, seats, hosts)


@given(st.lists(st.tuples(_WORKERS, st.integers(0, 2)), min_size=1, max_size=20), st.lists(_LABELS, min_size=3))
@settings(max_examples=400, deadline=None)
def test_no_machine_is_promised_twice(
    workers: list[tuple[Worker, int]], machine_labels: list[Mapping[str, str]]
) -> None:
    """There are three machines, each with just the room for the workers that were drawn with its number."""
    places = [place for _, place in workers]
    own = [(threads, is_gpu, labels and machine_labels[place]) for (threads, is_gpu, labels), place in workers]
    needs, _ = drawn(own, [])
    hosts = []
    for number, labels in enumerate(machine_labels[:3]):
        there = [need for need, place in zip(needs, places, strict=True) if place == number]
        num_cpus, num_gpus = sum(need.num_cpus for need in there), sum(need.num_gpus for need in there)
        hosts.append(host(str(number), num_cpus, num_gpus, **labels))
    seats = seat(needs, hosts)
    assert seats is not None or len(needs) > 5
    assert seats is None or has_room(needs, seats, hosts)
