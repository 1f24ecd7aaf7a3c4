"""Checks how the ranks of a machine claim its CPUs."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.host.cores import Claim, beside, claim_cores, cores_of, parse_cpus


@pytest.fixture
def claim(tmp_path: Path) -> Iterator[Callable[..., Claim]]:
    """Makes a function ``claim(count, **more)`` with locks of the test's own, which are released at the end."""
    claims: list[Claim] = []

    def make(count: int, **more: object) -> Claim:
        claims.append(claim_cores(count, **{"directory": tmp_path, "siblings": {}} | more))
        return claims[-1]

    yield make
    for made in claims:
        made.release()


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", {0}), ("0,4\n", {0, 4}), ("2-3", {2, 3}), ("0-1,64-65\n", {0, 1, 64, 65})]
)
def test_the_kernels_list_of_cpus_is_read(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "\n", "a", "1,,2", "0-x"])
def test_what_is_no_list_of_cpus_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_cpus(text)


TOPOLOGIES = {
    "one thread a core": ({cpu: f"{cpu}" for cpu in range(4)}, [[0], [1], [2], [3]]),
    "siblings far apart": ({cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    "siblings side by side": (
        {cpu: f"{cpu & ~1}-{cpu | 1}" for cpu in range(6)},
        [[0, 1], [2, 3], [4, 5]],
    ),
    "four threads a core": (
        {cpu: f"{cpu & ~3}-{cpu | 3}" for cpu in range(8)},
        [[0, 1, 2, 3], [4, 5, 6, 7]],
    ),
    "large cores with two threads, small ones with one": (
        {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5"},
        [[0, 1], [2, 3], [4], [5]],
    ),
}


@pytest.mark.parametrize(("siblings", "cores"), TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_cpus_are_told_apart_by_core(siblings: dict[int, str], cores: list[list[int]]) -> None:
    assert cores_of(siblings, siblings) == cores


def test_only_cpus_that_are_allowed_count() -> None:
    siblings = {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    assert cores_of([1, 2, 5, 7], siblings) == [[1, 5], [2], [7]]


def test_a_list_that_is_missing_or_unreadable_makes_a_core_of_its_own() -> None:
    assert cores_of([0, 1, 2, 3], {0: "what", 1: "1-2"}) == [[0], [1, 2], [3]]


@given(st.sets(st.integers(0, 31)), st.dictionaries(st.integers(0, 31), st.text("0123456789,-", max_size=6)))
def test_every_allowed_cpu_is_in_one_core(allowed: set[int], siblings: dict[int, str]) -> None:
    cores = cores_of(allowed, siblings)
    assert sorted(cpu for core in cores for cpu in core) == sorted(allowed)
    assert cores == sorted(sorted(core) for core in cores)


def test_second_threads_are_taken_beside_ones_own_first() -> None:
    assert beside([[0, 4], [1, 5], [2, 6], [3]], {1, 2}) == [5, 6, 4]


def test_a_rank_takes_one_thread_of_each_core_before_a_second(claim: Callable[..., Claim]) -> None:
    siblings = {cpu: f"{cpu & ~1}-{cpu | 1}" for cpu in range(8)}
    machine = {"allowed": range(8), "siblings": siblings}
    assert claim(2, **machine).cpus == {0, 2}
    assert claim(1, **machine).cpus == {4}
    assert claim(2, **machine).cpus == {6, 7}, "beside its own, not beside another rank's"
    assert claim(2, **machine).cpus == {1, 3}, "nothing else is left"


def test_two_ranks_take_different_cpus(claim: Callable[..., Claim]) -> None:
    allowed = [0, 1, 2, 3, 4]
    first, second = claim(2, allowed=allowed), claim(2, allowed=allowed)
    assert first.cpus == {0, 1} and second.cpus == {2, 3}
    assert not claim(2, allowed=allowed).cpus, "only one is left"
    assert claim(1, allowed=allowed).cpus == {4}, "and that was not kept"


def test_a_rank_that_dies_gives_its_cpus_back(tmp_path: Path, claim: Callable[..., Claim]) -> None:
    code = "import pathlib, sys; from workers.host.cores import claim_cores; c = claim_cores(2, directory=pathlib.Path(sys.argv[1]), allowed=[0, 1]); print(sorted(c.cpus), flush=True); sys.stdin.read()"  # noqa: E501
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[0, 1]\n"
        assert not claim(1, allowed=[0, 1]).cpus
        process.kill()
        process.wait(10)
    assert claim(2, allowed=[0, 1]).cpus == {0, 1}


def test_only_the_thread_that_pins_and_its_children_are_kept_to_the_cpus(claim: Callable[..., Claim]) -> None:
    cpu = min(os.sched_getaffinity(0))
    claimed = claim(1, allowed=[cpu])
    before = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def child() -> None:
        seen.append(os.sched_getaffinity(0))

    def parent() -> None:
        claimed.pin()
        thread = threading.Thread(target=child)
        thread.start()
        thread.join()

    thread = threading.Thread(target=parent)
    thread.start()
    thread.join()
    assert seen == [{cpu}]
    assert os.sched_getaffinity(0) == before


def test_this_machines_own_cpus_are_claimed_where_nothing_else_is_said(tmp_path: Path) -> None:
    claimed = claim_cores(1, directory=tmp_path)
    assert claimed.cpus == {min(os.sched_getaffinity(0))}
    os.close(*claimed.locks)


def test_a_directory_that_is_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert not claim_cores(1, directory=tmp_path / "link", allowed=[0]).cpus
    assert not list((tmp_path / "real").iterdir())


def test_a_place_that_cannot_be_written_leaves_the_rank_unpinned(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    claimed = claim_cores(1, directory=tmp_path / "file" / "below")
    assert not claimed.cpus
    before = os.sched_getaffinity(0)
    claimed.pin()
    assert os.sched_getaffinity(0) == before
