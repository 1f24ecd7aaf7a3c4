"""Which machine of a cluster each worker runs on."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.model.specs import DeviceSpec
from placement.planning.seating import Host, Need, need_of, seat


def host(name: str, num_cpus: float = 8, num_gpus: float = 0, **labels: str) -> Host:
    return Host(host_id=name, name=name, labels=labels, num_cpus=num_cpus, num_gpus=num_gpus, memory_bytes=None)


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


_LABELS = st.sampled_from([{}, {"kind": "big"}, {"kind": "small"}])


@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans(), _LABELS), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3), _LABELS), max_size=4),
)
def test_no_machine_is_promised_twice(
    workers: list[tuple[int, bool, Mapping[str, str]]], machines: list[tuple[int, int, Mapping[str, str]]]
) -> None:
    needs = [gpu(**labels) if is_gpu else cpu(threads, **labels) for threads, is_gpu, labels in workers]
    hosts = [host(str(i), cpus, gpus, **labels) for i, (cpus, gpus, labels) in enumerate(machines)]
    seats = seat(needs, hosts)
    for each in hosts if seats is not None else ():
        there = [need for need, taken in zip(needs, seats or (), strict=True) if taken is each]
        assert sum(need.num_cpus for need in there) <= each.num_cpus
        assert sum(need.num_gpus for need in there) <= each.num_gpus
        assert all(need.labels.items() <= each.labels.items() for need in there)
