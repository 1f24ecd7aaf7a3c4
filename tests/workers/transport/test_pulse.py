import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.workers.transport.conftest import MakeMeshes
from workers.transport.errors import PeerFailed
from workers.transport.mesh import Channel, Members, Mesh, join, listen
from workers.transport.pulse import SILENCE_S, TICK_S, Pulse


@pytest.fixture
def pulses(make_meshes: MakeMeshes) -> Iterator[list[Pulse]]:
    started = [_start(mesh) for mesh in make_meshes(3)]
    yield started
    for pulse in started:
        pulse.stop()


def _start(mesh: Mesh) -> Pulse:
    pulse = Pulse(mesh.of(Channel.PULSE))
    pulse.start()
    return pulse


def _wait_for_loss(pulse: Pulse, timeout_s: float) -> PeerFailed:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            pulse.check()
        except PeerFailed as error:
            return error
        time.sleep(0.01)
    raise AssertionError("nobody was lost")


def test_ranks_that_beat_are_not_lost(pulses: list[Pulse]) -> None:
    time.sleep(2 * SILENCE_S)
    for pulse in pulses:
        pulse.check()


def test_a_rank_that_fails_says_why_to_all(pulses: list[Pulse]) -> None:
    pulses[1].fail("ran out of memory")
    for rank in (0, 2):
        assert str(_wait_for_loss(pulses[rank], 5.0)) == "rank 1: ran out of memory"


def test_last_words_explain_a_connection_that_broke(pulses: list[Pulse]) -> None:
    pulses[2].fail("lost its disk")
    assert str(pulses[0].reason(PeerFailed(2, "closed its connection"))) == "rank 2: lost its disk"
    assert str(pulses[0].reason(PeerFailed(1, "closed its connection"))) == "rank 1: closed its connection"


def test_all_ranks_are_lost_to_one_that_can_watch_them_no_longer(
    make_meshes: MakeMeshes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever waits for a rank without a deadline would wait for ever."""
    mesh = make_meshes(3)[0]

    def fail() -> None:
        raise MemoryError("no room for a poll")

    with monkeypatch.context() as patch:
        patch.setattr(select, "poll", fail)
        pulse = _start(mesh)
        error = _wait_for_loss(pulse, 5.0)
    assert error.cause == "can no longer be watched: MemoryError: no room for a poll"
    for rank in (1, 2):
        assert pulse.reason(PeerFailed(rank, "closed its connection")).cause == error.cause
    pulse.stop()


_PEER = """
import sys, time
from workers.transport.mesh import Channel, Members, join, listen
from workers.transport.pulse import Pulse
members = Members(rank=1, addresses=[("127.0.0.1", int(sys.argv[1])), ("127.0.0.1", 1)], epoch=1, token=bytes(32))
with listen("127.0.0.1") as listener:
    pulse = Pulse(join(listener, members, deadline_s=time.monotonic() + 20).of(Channel.PULSE))
pulse.start()
print("beats", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "causes"),
    [
        (signal.SIGKILL, ("closed its connection", "its connection broke")),
        (signal.SIGSTOP, ("is frozen or cut off",)),
    ],
)
def test_a_process_that_is_killed_or_frozen_is_lost_within_two_seconds(
    number: signal.Signals, causes: tuple[str, ...]
) -> None:
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        peer = subprocess.Popen(
            [sys.executable, "-c", _PEER, str(port)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": "."}
        )
        try:
            members = Members(rank=0, addresses=[("127.0.0.1", port)] * 2, epoch=1, token=bytes(32))
            mesh = join(listener, members, deadline_s=time.monotonic() + 30.0)
            pulse = Pulse(mesh.of(Channel.PULSE))
            pulse.start()
            assert peer.stdout is not None and peer.stdout.readline() == b"beats\n"
            pulse.check()
            began_s = time.monotonic()
            peer.send_signal(number)
            error = _wait_for_loss(pulse, 10.0)
            assert error.rank == 1 and error.cause.startswith(causes)
            # Two seconds by its own count; on a busy machine its ticks come late, and are not counted double.
            assert SILENCE_S + 2 * TICK_S <= 2.0
            assert time.monotonic() - began_s < 4.0
            pulse.stop()
            mesh.close()
        finally:
            peer.kill()
            peer.wait()
            assert peer.stdout is not None
            peer.stdout.close()
