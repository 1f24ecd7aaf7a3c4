"""Emulated clusters are what was asked for, and leave nothing behind.

Times have exact lower bounds; the upper ones only say that a packet was not forgotten.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.netlab import system
from tests.netlab.lab import Host, Lab, lab
from tests.netlab.requirements import missing
from tests.netlab.specs import HostSpec, LinkConditions

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(120),
    pytest.mark.skipif((reason := missing()) is not None, reason=reason or ""),
]

REPOSITORY = Path(__file__).resolve().parents[2]
PROBES = [sys.executable, "-I", "-S", str(REPOSITORY / "tests/netlab/probes.py")]
ONE = HostSpec(name="one")
TWO = HostSpec(name="two")
END_S = 10.0


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    with lab(ONE, TWO, seed=3) as made:
        yield made


@pytest.fixture
def net(pair: Lab) -> Lab:
    """Two hosts with perfect links."""
    pair.change(LinkConditions())
    return pair


@contextmanager
def server(host: Host, kind: str) -> Iterator[tuple[str, str]]:
    """A probe that listens; yields where."""
    process = host.popen([*PROBES, kind, host.address], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield host.address, process.stdout.readline().strip()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_S)


def probe(host: Host, *args: str) -> Any:
    """What a probe saw."""
    return json.loads(host.run([*PROBES, *args]).stdout)


def trips_s(net: Lab, count: int = 10, timeout_s: float = 2.0) -> list[float]:
    """How long datagrams took from one to two and back."""
    with server(net["two"], "echo") as (address, port):
        found: list[float] = probe(net["one"], "ping", address, port, str(count), str(timeout_s))
    return found


def test_a_round_trip_takes_twice_the_delay(net: Lab) -> None:
    net.change(LinkConditions(delay_s=0.005))
    trips = trips_s(net)
    assert len(trips) == 10
    assert min(trips) >= 0.010
    assert min(trips) < 0.100


def test_a_delay_may_be_that_of_one_direction(net: Lab) -> None:
    net.change(LinkConditions(delay_s=0.03), source="two", target="one")
    assert net.conditions("one", "two").delay_s == 0.0
    assert 0.03 <= min(trips_s(net, 3)) < 0.06


def test_a_rate_is_the_most_that_gets_through(net: Lab) -> None:
    rate_bits_per_s, num_bytes = 50e6, 4_000_000
    net.change(LinkConditions(rate_bits_per_s=rate_bits_per_s, delay_s=0.001), source="one")
    with server(net["two"], "sink") as (address, port):
        took_s = probe(net["one"], "send", address, port, str(num_bytes))
    least_s = num_bytes * 8 / rate_bits_per_s
    assert least_s <= took_s < 4 * least_s


def test_what_was_lost_does_not_come_and_the_rest_does(net: Lab) -> None:
    net.change(LinkConditions(loss_fraction=0.5), target="two")
    with server(net["two"], "echo") as (address, port):
        came = probe(net["one"], "volley", address, port, "300")
    assert 60 < came < 240


def test_a_partition_lets_nothing_through_until_it_heals(net: Lab) -> None:
    net.change(LinkConditions(delay_s=0.001))
    with server(net["two"], "echo") as (address, port):

        def num_back(count: int, timeout_s: float) -> int:
            return len(probe(net["one"], "ping", address, port, str(count), str(timeout_s)))

        assert num_back(3, 2.0) == 3
        net.partition("one", "two")
        assert num_back(3, 0.2) == 0
        net.heal("one", "two")
        assert num_back(3, 2.0) == 3
    assert net.conditions("one", "two").delay_s == 0.001


def test_a_partition_may_be_of_one_direction(net: Lab) -> None:
    net.change(LinkConditions(is_partitioned=True), source="two", target="one")
    assert trips_s(net, 2, 0.2) == []


def test_a_host_has_its_own_name_and_nothing_but_loopback_and_its_device(net: Lab) -> None:
    code = "import socket; print(socket.gethostname(), sorted(name for _, name in socket.if_nameindex()))"
    seen = net["two"].run([sys.executable, "-I", "-S", "-c", code]).stdout.split(" ", 1)
    assert seen[0] == "two"
    assert "'net0'" in seen[1] and "'eth" not in seen[1]


def test_a_host_may_have_a_directory_of_its_own_and_chosen_addresses(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    with lab(HostSpec(name="one", tmp=tmp_path), HostSpec(name="two"), subnet="192.168.7") as net:
        assert [net[name].address for name in ("one", "two")] == ["192.168.7.1", "192.168.7.2"]
        assert net["one"].run(["ls", "/tmp"]).stdout == "here\n"
        assert net["two"].run(["ls", "/tmp"]).stdout != "here\n"


def test_a_process_that_fails_or_takes_too_long_is_told_of(net: Lab) -> None:
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        net["one"].run(["sh", "-c", "exit 3"])
    assert net["one"].run(["sh", "-c", "exit 3"], check=False).returncode == 3
    with pytest.raises(subprocess.TimeoutExpired):
        net["one"].run(["sleep", "60"], timeout_s=0.2)
    assert system.ip("netns", "pids", net["one"].namespace) == ""


@pytest.mark.skipif((no_shares := missing(cpu_shares=True)) is not None, reason=no_shares or "")
def test_a_share_of_a_core_is_the_most_that_a_host_gets() -> None:
    core = min(os.sched_getaffinity(0))
    with lab(HostSpec(name="weak", cpu_share=0.3, core=core)) as net:
        share = probe(net["weak"], "burn", "1.5")
        cores = net["weak"].run([sys.executable, "-I", "-S", "-c", "import os; print(os.sched_getaffinity(0))"])
    assert 0.08 < share < 0.40
    assert cores.stdout.strip() == f"{{{core}}}"


def test_two_labs_at_once_know_nothing_of_each_other(net: Lab) -> None:
    with lab(ONE, TWO) as other:
        other.change(LinkConditions(is_partitioned=True))
        assert len({host.address for made in (net, other) for host in (made["one"], made["two"])}) == 4
        assert len(trips_s(net, 3)) == 3
        assert trips_s(other, 1, 0.2) == []
    assert len(trips_s(net, 3)) == 3


def test_nothing_is_left_of_a_lab_whose_test_fails() -> None:
    share = None if missing(cpu_shares=True) else 0.5
    with pytest.raises(RuntimeError, match="the test fails"), lab(HostSpec(name="one", cpu_share=share), TWO) as net:
        relay, group = psutil.Process(net.relay_pid), net["one"].cpu_group
        child = net["one"].popen(["sh", "-c", "setsid sleep 60 & exec sleep 60"])
        wait_until(lambda: len(pids_of(net["one"])) == 2)
        sleepers = [psutil.Process(pid) for pid in pids_of(net["one"])]
        assert group is None or group.is_dir()
        raise RuntimeError("the test fails")
    assert child.returncode is not None
    assert not relay.is_running()
    assert not [sleeper for sleeper in sleepers if is_alive(sleeper)]
    assert not {host.namespace for host in (net["one"], net["two"])} & names()
    assert group is None or not group.exists()


def test_what_a_killed_test_left_is_removed_by_the_next_lab() -> None:
    code = (
        "from tests.netlab.lab import lab\n"
        "from tests.netlab.specs import HostSpec\n"
        "with lab(HostSpec(name='one')) as net:\n"
        "    sleeper = net['one'].popen(['sleep', '60'])\n"
        "    print(net['one'].namespace, net.relay_pid, flush=True)\n"
        "    sleeper.wait(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None
        namespace, relay_pid = test.stdout.readline().split()
        relay = psutil.Process(int(relay_pid))
        assert namespace in names()
        test.kill()
    wait_until(lambda: not is_alive(relay))
    with lab(TWO):
        assert namespace not in names()


def names() -> set[str]:
    """Of all network namespaces."""
    return {path.name for path in system.NAMESPACES.iterdir()}


def pids_of(host: Host) -> list[int]:
    """Who lives there."""
    return [int(pid) for pid in system.ip("netns", "pids", host.namespace).split()]


def is_alive(process: psutil.Process) -> bool:
    """A process that has ended may still wait for its parent to see that."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_until(true: Any) -> None:
    deadline_s = time.monotonic() + END_S
    while not true():
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.02)
