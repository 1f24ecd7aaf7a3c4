"""Joining a Ray cluster ends: in time where nothing answers, and at once where the user gives up."""

import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import ray

from orchestrator.errors import LaunchFailed
from orchestrator.launcher import joining
from orchestrator.launcher.joining import join
from placement.errors import InvalidConfig
from tests.orchestrator.launcher.test_ray_access import control_store
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.service import Command, free_port


@pytest.fixture
def silent_address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def mute_address() -> Iterator[str]:
    """Takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield "{}:{}".format(*server.getsockname())


def test_an_address_that_nothing_answers_at_is_refused_in_time(
    silent_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "JOIN_S", 0.5)
    words = r"cluster.ray_address: no Ray cluster .*no Ray head answers within 0.5 s: connection refused.*`ray start"
    with pytest.raises(InvalidConfig, match=words):
        join(silent_address, threading.Event())


def test_the_address_of_a_cluster_that_is_gone_is_refused_and_named(
    silent_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "JOIN_S", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", silent_address)  # what `auto` finds, as it does in the file of the last cluster
    with pytest.raises(InvalidConfig, match=f"no Ray head answers at {silent_address} within .*'auto'"):
        join("auto", threading.Event())


def test_who_gives_up_waits_no_longer(silent_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "JOIN_S", 10 * PATIENCE_S)
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    started_s = time.monotonic()
    with pytest.raises(LaunchFailed, match="stopped while the Ray cluster was joined"):
        join(silent_address, stop)
    assert time.monotonic() < started_s + PATIENCE_S


def test_what_takes_connections_and_lets_nobody_join_is_refused_in_time(
    mute_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "JOIN_S", 1.0)
    end = threading.Event()
    monkeypatch.setattr(ray, "init", lambda **_: end.wait(PATIENCE_S))
    with pytest.raises(InvalidConfig, match=f"listens at {mute_address}.*is Ray started on this machine"):
        join(mute_address, threading.Event())
    end.set()


def test_a_process_that_could_not_join_ends(mute_address: str) -> None:
    """Ray itself goes on trying on a thread of its own, which nobody waits for."""
    code = (
        "import sys, threading; from orchestrator.launcher import joining; joining.JOIN_S = 1.0\n"
        "try: joining.join(sys.argv[1], threading.Event())\n"
        "except joining.InvalidConfig as error: sys.exit(f'refused: {error}')"
    )
    with Command([sys.executable, "-c", code, mute_address]) as child:
        assert child.process.wait(PATIENCE_S) == 1, child.output()
        assert child.output().rstrip().splitlines()[-1].startswith("refused: cluster.ray_address: "), child.output()


@pytest.mark.parametrize("named", ["local", "ray://head:10001"])
def test_an_environment_that_names_no_head_is_refused(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", named)
    with pytest.raises(InvalidConfig, match=f"RAY_ADDRESS is '{named}', which is not host:port"):
        join("auto", threading.Event())


@pytest.mark.parametrize("error", [RuntimeError("other version"), KeyError("node_id")])
def test_why_ray_did_not_join_is_said(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with (
        control_store(asks_for_token=False) as address,
        pytest.raises(InvalidConfig, match=r"other version|KeyError: 'node_id'"),
    ):
        join(address, threading.Event())
