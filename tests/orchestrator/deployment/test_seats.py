"""How long ``serve`` looks for machines with room for its workers."""

import threading
import time

import pytest

from orchestrator.deployment import seats
from orchestrator.errors import LaunchFailed
from placement.planning.seating import Host, Need
from tests.support.clocks import PATIENCE_S

NEEDS = [Need(num_cpus=1, num_gpus=0, labels={})]
HOST = Host(host_id="a", name="a", labels={}, num_cpus=1, num_gpus=0, memory_bytes=None)


def test_who_is_asked_to_stop_looks_for_no_more_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "_SEAT_S", 10 * PATIENCE_S)
    stop = threading.Event()

    def find_hosts(told: threading.Event) -> tuple[Host, ...]:
        assert told is stop
        stop.set()
        return ()

    monkeypatch.setattr(seats, "find_hosts", find_hosts)
    started_s = time.monotonic()
    with pytest.raises(LaunchFailed, match="stopped while machines were looked for"):
        seats.find_seats(NEEDS, stop)
    assert time.monotonic() < started_s + PATIENCE_S


def test_room_that_becomes_free_a_moment_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "_SEAT_S", PATIENCE_S)
    answers = iter([(), (), (HOST,)])
    monkeypatch.setattr(seats, "find_hosts", lambda stop: next(answers))
    assert seats.find_seats(NEEDS, threading.Event()) == (HOST,)
