import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.workers.transport.conftest import TOKEN, MakeMeshes, members
from workers.transport.errors import PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import receive, send
from workers.transport.mesh import Channel, join, listen


def test_every_rank_is_connected_with_every_other(make_meshes: MakeMeshes) -> None:
    meshes = make_meshes(4)
    for rank, mesh in enumerate(meshes):
        for channel in Channel:
            assert sorted(mesh.of(channel)) == sorted(set(range(4)) - {rank})
    for a in range(4):
        for b in set(range(4)) - {a}:
            text = f"{a} to {b}".encode()
            deadline_s = time.monotonic() + 5.0
            send(meshes[a].of(Channel.STEPS)[b], Kind.STEP, memoryview(text), deadline_s=deadline_s)
            assert bytes(receive(meshes[b].of(Channel.STEPS)[a], Kind.STEP, deadline_s=deadline_s)) == text


def test_a_rank_alone_has_nobody_to_wait_for() -> None:
    with listen("127.0.0.1") as listener:
        assert not join(listener, members(0, [listener]), deadline_s=time.monotonic()).links


def test_who_does_not_come_is_named() -> None:
    with listen("127.0.0.1") as first, listen("127.0.0.1") as second:
        both = [first, second]
        with pytest.raises(PeerFailed, match="rank 1: did not connect in time"):
            join(first, members(0, both), deadline_s=time.monotonic() + 0.3)
    gone, again = socket.socket(), socket.socket()
    for one in (gone, again):
        one.bind(("127.0.0.1", 0))  # and nobody listens there
    with gone, again, pytest.raises(PeerFailed, match=r"rank 0: could not be reached at 127\.0\.0\.1:"):
        join(again, members(1, [gone, again]), deadline_s=time.monotonic() + 0.3)


def test_a_wait_for_a_rank_that_takes_no_connection_can_be_ended() -> None:
    """The system connects, since rank 0 listens, but rank 0 never answers."""
    began_s = time.monotonic()

    def alive() -> None:
        if time.monotonic() - began_s > 0.3:
            raise InterruptedError("was told to stop")

    with listen("127.0.0.1") as first, listen("127.0.0.1") as second:
        with pytest.raises(InterruptedError, match="was told to stop"):
            join(second, members(1, [first, second]), deadline_s=time.monotonic() + 10.0, alive=alive)
        assert time.monotonic() - began_s < 5.0


@pytest.mark.parametrize(
    ("token", "epoch"), [(bytes(len(TOKEN)), 1), (TOKEN, 2)], ids=["another token", "another epoch"]
)
def test_a_stranger_is_turned_away_and_the_rank_still_taken(token: bytes, epoch: int) -> None:
    with listen("127.0.0.1") as first, listen("127.0.0.1") as second, ThreadPoolExecutor(3) as pool:
        listeners = [first, second]
        silent = socket.create_connection(first.getsockname())
        accepting = pool.submit(join, first, members(0, listeners), deadline_s=time.monotonic() + 10.0)
        stranger = members(1, listeners, token=token, epoch=epoch)
        with pytest.raises(PeerFailed, match="rank 0: did not take the connection"):
            join(second, stranger, deadline_s=time.monotonic() + 5.0)
        meshes = [join(second, members(1, listeners), deadline_s=time.monotonic() + 5.0), accepting.result()]
        assert [sorted(mesh.of(Channel.COMPUTE)) for mesh in meshes] == [[0], [1]]
        for mesh in meshes:
            mesh.close()
        silent.close()


def test_pickles_and_noise_are_turned_away() -> None:
    with listen("127.0.0.1") as first, listen("127.0.0.1") as second, ThreadPoolExecutor(1) as pool:
        listeners = [first, second]
        accepting = pool.submit(join, first, members(0, listeners), deadline_s=time.monotonic() + 10.0)
        with socket.create_connection(first.getsockname()) as noise:
            noise.settimeout(5.0)
            noise.sendall(b"\x80\x04\x95" + bytes(200))
            with contextlib.suppress(ConnectionResetError):  # as it is where not all was read
                assert noise.recv(100) == b""
        joined = [join(second, members(1, listeners), deadline_s=time.monotonic() + 5.0), accepting.result()]
        for mesh in joined:
            mesh.close()
