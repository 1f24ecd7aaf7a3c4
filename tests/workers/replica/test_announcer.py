"""A leader announces steps without waiting for the ranks that follow, in order, and ends with the one that stalls."""

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.replica import announcer
from workers.replica.followers import BeginMessage, Followers, StepPart
from workers.step.types import Batch, SequenceInput
from workers.transport.errors import PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, receive
from workers.transport.pulse import Pulse

EPOCH = 3
NUM_TOKENS = 20_000  # of a step that small socket buffers do not take whole
AT_ONCE_S = 1.0  # far less than a follower's time to accept an announcement


class Pair:
    """The leader's link to a follower, and the follower's end of it."""

    def __init__(self, rank: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 13)
            near = socket.socket()
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 13)
            near.connect(server.getsockname())
            far, _ = server.accept()
        self.leader = Link(near, peer=rank, epoch=EPOCH)
        self.follower = Link(far, peer=0, epoch=EPOCH)

    def next_step(self) -> int:
        """Receives the next announcement whole, and returns its step's number."""
        payload = receive(self.follower, Kind.STEP, deadline_s=time.monotonic() + 10.0)
        step = pb.Step.FromString(bytes(payload))
        assert len(step.sequences[0].token_ids) == NUM_TOKENS
        return int(step.number)


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    made = [Pair(rank) for rank in (1, 2)]
    yield made
    for pair in made:
        pair.leader.close()
        pair.follower.close()


@pytest.fixture
def idle() -> Pulse:
    """A pulse of a replica in which nobody is lost."""
    return Pulse({})


def leading(pairs: list[Pair], pulse: Pulse, *, timeout_s: float = 20.0) -> Followers:
    links = {pair.leader.peer: pair.leader for pair in pairs}
    return Followers(steps=links, begins={}, pulse=pulse, timeout_s=timeout_s)


def other(pairs: list[Pair], rank: int) -> Pair:
    """The pair of the follower that is not ``rank``."""
    return next(pair for pair in pairs if pair.leader.peer != rank)


def large_step() -> Batch:
    tokens = SequenceInput(token_ids=[1 << 20] * NUM_TOKENS, start=0, runs=((0, NUM_TOKENS),))
    return Batch(sequences=(tokens,))


def test_a_follower_that_stops_reading_does_not_block_announcements(pairs: list[Pair], idle: Pulse) -> None:
    followers, batch = leading(pairs, idle), large_step()
    began_s = time.monotonic()
    assert [followers.announce(batch) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert time.monotonic() - began_s < AT_ONCE_S
    followers.check()
    followers.close()


def test_announcements_keep_their_order_however_late_they_are_read(pairs: list[Pair], idle: Pulse) -> None:
    followers, batch = leading(pairs, idle), large_step()
    for _ in range(3):
        followers.announce(batch)
    for number in range(2):
        assert [pair.next_step() for pair in reversed(pairs)] == [number] * 2
    followers.announce(batch)
    for number in (2, 3):
        assert [pair.next_step() for pair in pairs] == [number] * 2
    followers.begin(3, [])  # nothing has failed
    followers.close()


def test_what_the_sockets_take_at_once_needs_no_thread(
    pairs: list[Pair], idle: Pulse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*_: object, **__: object) -> None:
        raise AssertionError("a thread is started")

    monkeypatch.setattr(announcer.threading, "Thread", no_thread)
    followers = leading(pairs, idle)
    followers.announce(Batch(sequences=(SequenceInput(token_ids=[7], start=0, runs=((0, 1),)),)))
    for pair in pairs:
        payload = receive(pair.follower, Kind.STEP, deadline_s=time.monotonic() + 5.0)
        assert pb.Step.FromString(bytes(payload)).sequences[0].token_ids == [7]
    followers.close()


@pytest.mark.parametrize("stalled", [1, 2])
def test_a_follower_that_stalls_fails_the_next_step_that_begins(pairs: list[Pair], idle: Pulse, stalled: int) -> None:
    followers, batch = leading(pairs, idle, timeout_s=0.3), large_step()
    followers.announce(batch)
    assert other(pairs, stalled).next_step() == 0
    time.sleep(0.6)
    assert followers.announce(batch) == 1, "the thread that prepares steps is not the one that hears of it"
    for call in (lambda: followers.begin(0, []), followers.check):
        with pytest.raises(PeerFailed, match=f"rank {stalled}: did not answer in time"):
            call()
    followers.close()


def test_a_connection_that_breaks_fails_the_next_step_that_begins(pairs: list[Pair], idle: Pulse) -> None:
    followers, batch = leading(pairs, idle), large_step()
    followers.announce(batch)
    pairs[1].follower.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pairs[1].follower.socket.close()
    time.sleep(0.3)
    followers.announce(batch)
    with pytest.raises(PeerFailed, match=r"rank 2: its connection broke"):
        followers.begin_part(BeginMessage(part=StepPart.FORWARD, number=0))
    followers.close()


@pytest.mark.parametrize("stalled", [1, 2])
def test_the_follower_that_fills_the_queue_is_named(pairs: list[Pair], idle: Pulse, stalled: int) -> None:
    followers, batch = leading(pairs, idle), large_step()
    followers.announce(batch)
    assert other(pairs, stalled).next_step() == 0
    for _ in range(announcer.MOST_QUEUED - 1):
        followers.announce(batch)
    followers.check()
    followers.announce(batch)
    cause = f"has not taken any of {announcer.MOST_QUEUED} announced steps"
    with pytest.raises(PeerFailed, match=f"rank {stalled}: {cause}"):
        followers.check()
    followers.close()


def test_closing_gives_up_what_is_queued(pairs: list[Pair], idle: Pulse) -> None:
    before = set(threading.enumerate())
    followers, batch = leading(pairs, idle), large_step()
    for _ in range(3):
        followers.announce(batch)
    started = set(threading.enumerate()) - before
    assert [thread.name for thread in started] == ["announcer"]
    began_s = time.monotonic()
    followers.close()
    assert time.monotonic() - began_s < AT_ONCE_S
    assert not any(thread.is_alive() for thread in started)
    followers.announce(batch)  # is ignored
