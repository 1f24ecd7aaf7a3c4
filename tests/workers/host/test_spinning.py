"""How often threads spin follows the cores as they are, and not each throttled moment."""

import os

import pytest

from placement.measured.core_share import FEW_SPINS, MANY_SPINS
from workers.host.spinning import Spinning


class System:
    """Files of a system, and its clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.files = {"/proc/self/cgroup": "0::/\n"}
        self.num_reads = 0

    def read(self, path: str) -> str | None:
        self.num_reads += 1
        return self.files.get(path)

    def throttle(self, periods: int) -> None:
        self.files["/sys/fs/cgroup/cpu.stat"] = f"nr_throttled {periods}\n"

    def wait_for_a_core(self, percent: float) -> None:
        self.files["/proc/pressure/cpu"] = f"some avg10={percent:.2f} avg60=0.00 avg300=0.00 total=1\n"


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    return System()


def spinning(system: System, num_threads: int = 2) -> tuple[Spinning, list[int]]:
    """Looks at the system; the list gets every choice."""
    chosen: list[int] = []
    return Spinning(num_threads, read=system.read, clock=lambda: system.now_s, use=chosen.append), chosen


def test_a_choice_is_told_once_and_again_when_it_changes(system: System) -> None:
    watching, chosen = spinning(system)
    for percent in (0.0, 1.0, 80.0, 80.0, 2.0):
        system.wait_for_a_core(percent)
        watching.look()
        system.now_s += 2.0
    assert chosen == [MANY_SPINS, FEW_SPINS, MANY_SPINS]


def test_more_threads_than_cores_never_spin_for_long(system: System) -> None:
    watching, chosen = spinning(system, num_threads=3)
    watching.look()
    assert chosen == [FEW_SPINS]


def test_what_was_throttled_before_counts_no_more_and_what_is_throttled_counts_for_a_while(system: System) -> None:
    system.throttle(70)
    watching, chosen = spinning(system)
    watching.look()
    assert chosen == [MANY_SPINS]
    system.throttle(71)
    system.now_s += 2.0
    watching.look()
    system.now_s += 29.0
    watching.look()
    assert chosen == [MANY_SPINS, FEW_SPINS]
    system.now_s += 2.0
    watching.look()
    assert chosen == [MANY_SPINS, FEW_SPINS, MANY_SPINS]


def test_it_looks_every_two_seconds_at_most(system: System) -> None:
    watching, _ = spinning(system)
    watching.look()
    before = system.num_reads
    system.now_s += 1.9
    watching.look()
    assert system.num_reads == before
    system.now_s += 0.2
    watching.look()
    assert system.num_reads > before
