"""Where the workers of a joined cluster run: who looks how long for room, who names a machine, who is told apart."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.document import Config
from orchestrator.deployment import seats
from orchestrator.deployment.seats import Seats, check_large_enough, crowded, find_seats, listening_host, pin_named
from orchestrator.deployment.telling_apart import check_told_apart, unequal_pairs
from orchestrator.errors import LaunchFailed
from placement.errors import InvalidConfig
from placement.planning.seating import NODE_ID_LABEL, Host, Need, named, seat
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.deployment import in_stages, make_config, shared_sequences, two_ranks


def host(name: str, address: str, num_cpus: float = 4, **labels: str) -> Host:
    return Host(
        host_id=f"id-{name}",
        name=name,
        labels=labels | {NODE_ID_LABEL: f"id-{name}"},
        num_cpus=num_cpus,
        num_gpus=0,
        memory_bytes=None,
        total_cpus=num_cpus,
        total_gpus=0,
        address=address,
    )


BIG, SMALL = host("big.lan", "10.0.0.1", kind="big"), host("small.lan", "10.0.0.2", kind="small")
ONE = Need(num_cpus=1, num_gpus=0, labels={})


def joined(tmp_path: Path, *workers: dict[str, Any], sections: dict[str, Any] | None = None) -> Config:
    """A configuration on a Ray cluster that was there before; ``workers`` changes each of its workers."""
    config = make_config(tmp_path, tmp_path, **(two_ranks() if sections is None else sections))
    each = tuple(
        dataclasses.replace(worker, count=1, name=name, **changes)
        for worker, name, changes in zip(
            config.cluster.each_worker, config.cluster.worker_names, workers or ({}, {}), strict=True
        )
    )
    return dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, ray_address="auto", workers=each))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return joined(tmp_path, {}, sections={"cluster": {"workers": [{"threads": 1}]}})


def test_who_is_asked_to_stop_looks_for_no_more_machines(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "_SEAT_S", 10 * PATIENCE_S)
    stop = threading.Event()

    def find_hosts(told: threading.Event) -> tuple[Host, ...]:
        assert told is stop
        stop.set()
        return ()

    monkeypatch.setattr(seats, "find_hosts", find_hosts)
    started_s = time.monotonic()
    with pytest.raises(LaunchFailed, match="stopped while machines were looked for"):
        find_seats(config, [ONE], stop, num_layers=8)
    assert time.monotonic() < started_s + PATIENCE_S


def test_room_that_becomes_free_a_moment_later_is_found(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "_SEAT_S", PATIENCE_S)
    answers = iter([(), (), (BIG,)])
    monkeypatch.setattr(seats, "find_hosts", lambda stop: next(answers))
    assert find_seats(config, [ONE], threading.Event(), num_layers=8).hosts == (BIG,)


@pytest.mark.parametrize("names", [("small", "big"), ("small.lan", "10.0.0.1"), ("10.0.0.2", "id-big.lan")])
def test_a_worker_runs_on_the_machine_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    monkeypatch.setattr(seats, "find_hosts", lambda stop: (BIG, SMALL))
    found = find_seats(
        joined(tmp_path, {"node": names[0]}, {"node": names[1]}), [ONE, ONE], threading.Event(), num_layers=8
    )
    assert found.hosts == (SMALL, BIG)
    assert [need.labels[NODE_ID_LABEL] for need in found.needs] == ["id-small.lan", "id-big.lan"]


def test_a_machine_that_joins_a_moment_later_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "_SEAT_S", PATIENCE_S)
    answers = iter([(BIG,), (BIG, SMALL)])
    monkeypatch.setattr(seats, "find_hosts", lambda stop: next(answers))
    config = joined(tmp_path, {"node": "big"}, {"node": "small"})
    assert find_seats(config, [ONE, ONE], threading.Event(), num_layers=8).hosts == (BIG, SMALL)


def test_a_name_that_no_machine_has_or_several_have_is_refused_with_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seats, "_SEAT_S", 0.0)
    monkeypatch.setattr(seats, "find_hosts", lambda stop: (BIG, SMALL))
    config = joined(tmp_path, {"node": "large"}, {})
    with pytest.raises(
        InvalidConfig, match=r"cluster.workers.0.node: is no machine.*'large'.*big.lan \(10.0.0.1\), small.lan \(10"
    ):
        find_seats(config, [ONE, ONE], threading.Event(), num_layers=8)
    twin = dataclasses.replace(SMALL, name="big.lan")
    with pytest.raises(InvalidConfig, match=r"several machines.*Write the address of one: 10.0.0.1, 10"):
        pin_named(joined(tmp_path, {"node": "big"}, {}), [ONE, ONE], (BIG, twin))


def check(config: Config, needs: Sequence[Need], *seats: Host, hosts: Sequence[Host] = (BIG, SMALL)) -> None:
    check_told_apart(config, 8, needs, hosts, seats or None)


def test_unequal_shares_that_nothing_tells_apart_are_refused_with_the_fix(tmp_path: Path) -> None:
    config = joined(tmp_path)
    for seated in ((BIG, SMALL), (SMALL, BIG), ()):
        with pytest.raises(
            InvalidConfig, match=r"worker-0, worker-1.*node: (big|small).lan \(10.0.0.\d\) or (big|small)"
        ):
            check(config, [ONE, ONE], *seated)


def test_that_a_machine_is_full_tells_nobody_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [dataclasses.replace(each, num_cpus=0.0) for each in (BIG, SMALL)]
    with pytest.raises(InvalidConfig, match="unequal shares"):
        check(joined(tmp_path), [ONE, ONE], hosts=full)


def test_it_is_found_before_workers_are_placed_on_several_machines_but_not_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = joined(tmp_path)
    monkeypatch.setattr(seats, "find_hosts", lambda stop: (host("a", "1", 1), host("b", "2", 1)))
    with pytest.raises(InvalidConfig, match="unequal shares"):
        find_seats(config, [ONE, ONE], threading.Event(), num_layers=8)
    monkeypatch.setattr(seats, "find_hosts", lambda stop: (host("a", "1", 2), host("b", "2", 1)))
    found = find_seats(config, [ONE, ONE], threading.Event(), num_layers=8)
    assert found.hosts is not None and {each.name for each in found.hosts} == {"a"}


def test_labels_names_and_sizes_tell_workers_apart(tmp_path: Path) -> None:
    config = joined(tmp_path)
    by_label = [dataclasses.replace(ONE, labels={"kind": kind}) for kind in ("big", "small")]
    check(config, by_label, BIG, SMALL)
    check(config, [*by_label[:1], ONE], BIG, SMALL)
    large, larger = dataclasses.replace(ONE, num_cpus=8), dataclasses.replace(SMALL, total_cpus=8)
    check(config, [large, ONE], larger, BIG)
    apart = joined(tmp_path, {"node": "big"}, {"node": "small"})
    check(apart, pin_named(apart, [ONE, ONE], (BIG, SMALL)), BIG, SMALL)
    with pytest.raises(InvalidConfig):
        check(config, [dataclasses.replace(ONE, num_cpus=4), ONE], BIG, SMALL)


def test_a_machine_that_nobody_could_swap_to_is_no_choice(tmp_path: Path) -> None:
    """The third machine would take both, but each of the two was given another."""
    pinned = [dataclasses.replace(ONE, labels={NODE_ID_LABEL: f"id-{each.name}"}) for each in (BIG, SMALL)]
    check(joined(tmp_path), pinned, BIG, SMALL, hosts=(BIG, SMALL, host("third", "10.0.0.3")))


def test_a_worker_that_no_machine_could_ever_take_is_refused_at_once(tmp_path: Path) -> None:
    apart = joined(tmp_path, {"node": "small"}, {"node": "big"})
    pinned = pin_named(apart, [dataclasses.replace(ONE, num_cpus=5), ONE], (BIG, SMALL))
    with pytest.raises(InvalidConfig, match=r"node small.lan does not have 5 CPUs: it has 4 .*Lower threads"):
        check_large_enough(apart, pinned, (BIG, SMALL))
    check_large_enough(apart, [ONE, pinned[1]], (dataclasses.replace(BIG, num_cpus=0.0), SMALL))


def test_an_exact_name_counts_before_a_short_one_and_an_address_may_be_of_two() -> None:
    exact = dataclasses.replace(SMALL, name="big")
    assert named("big", (BIG, exact)) == [exact] and named("big", (BIG, SMALL)) == [BIG]
    twin = dataclasses.replace(BIG, host_id="other")
    assert named("10.0.0.1", (BIG, twin)) == [BIG, twin] and named("id-big.lan", (BIG, twin)) == [BIG]


@pytest.mark.parametrize(
    ("sections", "pairs"),
    [
        (two_ranks((1, 1)), []),
        (two_ranks((2, 2)), []),
        (two_ranks((3, 1)), [(0, 1)]),
        (two_ranks((1, 1), count=2), []),
        (shared_sequences((1, 2, 2)), [(0, 1), (0, 2)]),
        (in_stages((1,), (1,)), []),
        (in_stages((1,), (1,), last_layers=4), []),
        (in_stages((1,), (1,), last_layers=1), [(0, 1)]),
        (in_stages((1, 1), (1,)), [(0, 2), (1, 2)]),
        ({"cluster": {"workers": [{"count": 2, "threads": 1}]}}, []),
    ],
)
def test_shares_are_unequal_where_they_are_asked_to_be(
    tmp_path: Path, sections: dict[str, Any], pairs: list[tuple[int, int]]
) -> None:
    found = list(unequal_pairs(make_config(tmp_path, tmp_path, **sections), 8))
    assert found == [(*pair, "unequal shares") for pair in pairs]


def test_workers_of_different_roles_are_unequal_whatever_they_hold(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "cluster": {"workers": [{"name": name, "threads": 1} for name in "abc"]},
        "serving": {"pools": {"prefill": {"workers": ["b"]}}},
    }
    pairs = [(0, 1, "different roles"), (1, 2, "different roles")]
    assert list(unequal_pairs(make_config(tmp_path, tmp_path, **sections), 8)) == pairs
    roles = {"a": "decode", "b": "prefill", "c": "decode"}
    replicas = [{"stages": [{"workers": [name]}], "role": role} for name, role in roles.items()]
    sections["serving"] = {"parallelism": {"replicas": replicas}}
    assert list(unequal_pairs(make_config(tmp_path, tmp_path, **sections), 8)) == pairs


def test_a_whole_replica_is_a_larger_share_than_half_of_another(tmp_path: Path) -> None:
    stages = [[{"workers": ["worker-0"]}], [{"workers": ["worker-1", "worker-2"]}]]
    sections = {
        "cluster": {"workers": [{"count": 3, "threads": 1}]},
        "serving": {"parallelism": {"replicas": [{"stages": each} for each in stages]}},
    }
    found = list(unequal_pairs(make_config(tmp_path, tmp_path, **sections), 8))
    assert found == [(0, 1, "unequal shares"), (0, 2, "unequal shares")]


def test_machines_that_are_not_used_are_told_of_where_one_has_all_of_a_replica(tmp_path: Path) -> None:
    def found(config: Config, *hosts: Host) -> object:
        return crowded(config, Seats(needs=(ONE, ONE), hosts=hosts, machines=(BIG, SMALL)))

    config = joined(tmp_path)
    assert found(config, BIG, BIG) == (BIG, [SMALL])
    assert found(config, BIG, SMALL) is None
    assert found(joined(tmp_path, {"node": "big"}, {"node": "big"}), BIG, BIG) is None
    assert (
        found(joined(tmp_path, {}, {}, sections={"cluster": {"workers": [{"threads": 1, "count": 2}]}}), BIG, BIG)
        is None
    )
    full = Seats(needs=(ONE, ONE), hosts=(BIG, BIG), machines=(BIG, dataclasses.replace(SMALL, num_cpus=0.0)))
    assert crowded(config, full) is None


def test_workers_listen_on_loopback_only_where_all_are_on_this_machine(tmp_path: Path) -> None:
    config = joined(tmp_path)

    def listens(*hosts: Host, bind_host: str | None = None, ray_address: str = "auto") -> str | None:
        cluster = dataclasses.replace(config.cluster, bind_host=bind_host, ray_address=ray_address)
        seated = Seats(needs=(ONE, ONE), hosts=hosts or None)
        return listening_host(dataclasses.replace(config, cluster=cluster), seated, here="id-big.lan")

    assert listens(BIG, BIG) == "127.0.0.1"
    assert listens(BIG, SMALL) is None and listens(SMALL, SMALL) is None and listens() is None
    assert listens(ray_address="local") == "127.0.0.1"
    assert listens(BIG, SMALL, bind_host="0.0.0.0") == "0.0.0.0"


def test_a_seat_is_no_other_than_the_machine_that_was_named() -> None:
    pinned = [dataclasses.replace(ONE, labels={NODE_ID_LABEL: "id-small.lan"}), ONE]
    assert seat(pinned, (BIG, SMALL)) is not None
    assert seat([dataclasses.replace(pinned[0], num_cpus=5)], (BIG, SMALL)) is None
