"""The compiled direct all-reduce over real connections: the bits and frames of the one in Python, and its errors."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu.machine import threads
from kernels.cpu.machine.columns_ir import ColumnTile
from tests.workers.transport.conftest import MakeMeshes
from workers.collectives.algorithms import Peers, direct
from workers.collectives.direct_sums import CompiledAllReduce
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import HEADER_BYTES, Kind, header
from workers.transport.link import Link
from workers.transport.mesh import Channel

SIZES = (1, 31, 64, 1000, 300_001)
EPOCH = 7


def sums_of(links: dict[int, Link], rank: int, **options: Any) -> CompiledAllReduce:
    return CompiledAllReduce(rank=rank, links=links, timeout_s=20.0, alive=lambda: None, **options)


def all_reduce(
    sums: CompiledAllReduce, x: Tensor, timeout_s: float = 20.0, alive: Callable[[], None] = lambda: None
) -> None:
    sums.all_reduce(x, deadline_s=time.monotonic() + timeout_s, alive=alive)


def in_python(links: dict[int, Link], rank: int, x: Tensor) -> None:
    deadline_s = time.monotonic() + 20.0
    direct(Peers(rank=rank, num_ranks=len(links) + 1, links=links, deadline_s=deadline_s, alive=lambda: None), x)


def in_tiles(sums: CompiledAllReduce, x: Tensor, num_tiles: int, product_s: float) -> None:
    """All-reduces in column tiles, as a program does whose products take so long."""
    sums.begin()
    for number in range(num_tiles):
        time.sleep(product_s)
        ticket = np.zeros(1, np.int64)
        arguments = sums.arguments(x, int(ticket.ctypes.data), ColumnTile(number, num_tiles))
        threads.run(sums.function, arguments, 1)
    sums.end()


def at_once(calls: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(calls)) as pool:
        for running in [pool.submit(call) for call in calls]:
            running.result(30.0)


@pytest.mark.every_target
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_python_whoever_of_the_ranks_has_no_code(
    make_meshes: MakeMeshes, num_ranks: int, dtype: torch.dtype
) -> None:
    links = [mesh.of(Channel.COMPUTE) for mesh in make_meshes(num_ranks)]
    sums = [sums_of(link, rank) for rank, link in enumerate(links)]
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        parts = [torch.randn(size, generator=generator).to(dtype) for _ in range(num_ranks)]
        found = []
        for num_compiled in range(num_ranks + 1):
            xs = [part.clone() for part in parts]
            at_once(
                [
                    partial(all_reduce, sums[rank], x)
                    if rank < num_compiled
                    else partial(in_python, links[rank], rank, x)
                    for rank, x in enumerate(xs)
                ]
            )
            found += xs
        assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("buffer_bytes", [None, 16384])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("num_tiles", [1, 2, 8])
def test_column_tiles_are_summed_as_they_come_through_buffers_of_any_size(
    make_meshes: MakeMeshes, buffer_bytes: int | None, num_ranks: int, num_tiles: int
) -> None:
    links = [mesh.of(Channel.COMPUTE) for mesh in make_meshes(num_ranks)]
    for link in (link for rank in links for link in rank.values()):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if buffer_bytes else ():
            link.socket.setsockopt(socket.SOL_SOCKET, option, buffer_bytes or 0)
    sums = [sums_of(link, rank, num_tiles=lambda _: num_tiles) for rank, link in enumerate(links)]
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 7, 200):
        parts = [torch.randn(rows, 512, generator=generator).bfloat16() for _ in range(num_ranks)]
        expected = torch.stack([part.float() for part in parts]).sum(dim=0).bfloat16()
        xs = [part.clone() for part in parts]
        assert sums[0].num_column_tiles(xs[0]) == num_tiles

        at_once([partial(in_tiles, sums[rank], x, num_tiles, 0.002 * rank) for rank, x in enumerate(xs)])
        for x in xs:
            torch.testing.assert_close(x, expected, atol=0.02, rtol=0.02)
            assert torch.equal(x, xs[0])
        at_once([partial(in_python, links[rank], rank, torch.ones(3)) for rank in range(num_ranks)])


@pytest.mark.parametrize(
    ("shape", "wanted", "found"),
    [((4, 512), 8, 8), ((4, 96), 8, 1), ((4, 64), 8, 2), ((4, 500), 8, 1), ((257, 512), 8, 1), ((256, 512), 4, 4)],
)
def test_column_tiles_are_of_whole_vectors_and_of_few_rows(
    pair: tuple[Link, socket.socket], shape: tuple[int, int], wanted: int, found: int
) -> None:
    sums = sums_of({1: pair[0]}, 0, num_tiles=lambda _: wanted)
    assert sums.num_column_tiles(torch.zeros(shape, dtype=torch.bfloat16)) == found


@pytest.fixture
def pair() -> Iterator[tuple[Link, socket.socket]]:
    """A link to rank 1, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    link = Link(here, peer=1, epoch=EPOCH)
    with there:
        yield link, there
    link.close()


X = torch.ones(4, 64)
PAYLOAD = memoryview(X.numpy().tobytes())
GOOD = header(Kind.TENSOR, PAYLOAD, epoch=EPOCH, number=0)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (header(Kind.TENSOR, PAYLOAD, epoch=EPOCH - 1, number=0) + PAYLOAD, "fenced"),
        (header(Kind.TENSOR, PAYLOAD, epoch=EPOCH, number=1) + PAYLOAD, "frame 1 came where 0"),
        (header(Kind.TENSOR, PAYLOAD[4:], epoch=EPOCH, number=0) + PAYLOAD, "has 1020 bytes"),
        (header(Kind.STEP, PAYLOAD, epoch=EPOCH, number=0) + PAYLOAD, "a STEP frame came where a TENSOR"),
        (bytes(HEADER_BYTES) + PAYLOAD, "no frame begins"),
        (GOOD + b"\1" + PAYLOAD[1:], "damaged"),
        (GOOD + PAYLOAD[:-1] + b"\1", "damaged"),
        (GOOD[:-1] + bytes([GOOD[-1] ^ 128]) + PAYLOAD, "damaged"),
    ],
)
def test_what_is_not_due_is_refused(pair: tuple[Link, socket.socket], sent: bytes, why: str) -> None:
    link, there = pair
    there.sendall(sent)
    with pytest.raises(BadFrame, match=why):
        all_reduce(sums_of({1: link}, 0), X.clone())


def test_a_peer_that_goes_is_an_error_at_once(pair: tuple[Link, socket.socket]) -> None:
    link, there = pair
    threading.Timer(0.2, there.close).start()
    with pytest.raises(PeerFailed, match=r"rank 1: (closed its connection|its connection broke)"):
        all_reduce(sums_of({1: link}, 0), X.clone())


def test_a_connection_that_is_reset_is_an_error(pair: tuple[Link, socket.socket]) -> None:
    link, there = pair
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    threading.Timer(0.2, there.close).start()
    with pytest.raises(PeerFailed, match=r"its connection broke|closed its connection"):
        all_reduce(sums_of({1: link}, 0), torch.ones(1 << 20))  # more than the buffers hold


def test_a_peer_that_says_nothing_is_given_up_in_time(pair: tuple[Link, socket.socket]) -> None:
    began_s = time.monotonic()
    with pytest.raises(PeerFailed, match="rank 1: did not answer in time"):
        all_reduce(sums_of({1: pair[0]}, 0), X.clone(), timeout_s=0.5)
    assert 0.4 < time.monotonic() - began_s < 5.0


def test_a_peer_that_sends_ever_less_than_a_frame_is_given_up_in_time(pair: tuple[Link, socket.socket]) -> None:
    link, there = pair
    over = threading.Event()

    def trickle() -> None:
        for byte in GOOD + PAYLOAD:
            if over.wait(0.02):
                return
            there.sendall(bytes([byte]))

    beside = threading.Thread(target=trickle)
    beside.start()
    try:
        with pytest.raises(PeerFailed, match="did not answer in time"):
            all_reduce(sums_of({1: link}, 0), X.clone(), timeout_s=0.5)
    finally:
        over.set()
        beside.join()


def test_what_is_known_of_a_lost_rank_is_raised_from_the_wait(pair: tuple[Link, socket.socket]) -> None:
    def alive() -> None:
        raise PeerFailed(3, "is frozen")

    sums = sums_of({1: pair[0]}, 0, reason=lambda error: PeerFailed(error.rank, f"because {error.cause}"))
    with pytest.raises(PeerFailed, match="rank 3: is frozen"):
        all_reduce(sums, X.clone(), alive=alive)
    with pytest.raises(PeerFailed, match="rank 3: because is frozen"):
        sums.end()


def test_after_a_failure_nothing_is_sent_any_more(pair: tuple[Link, socket.socket]) -> None:
    link, there = pair
    there.sendall(bytes(HEADER_BYTES) + PAYLOAD)
    sums = sums_of({1: link}, 0)
    for _ in range(2):
        with pytest.raises(BadFrame):
            all_reduce(sums, X.clone())
    there.settimeout(1.0)
    assert len(there.recv(1 << 16, socket.MSG_WAITALL | socket.MSG_DONTWAIT)) == HEADER_BYTES + len(PAYLOAD)


def test_a_frame_of_a_later_tile_that_is_not_due_is_named(pair: tuple[Link, socket.socket]) -> None:
    """The peer cuts its all-reduces into other tiles."""
    link, there = pair
    x = torch.ones(4, 64)
    half = bytes(x[:, :32].contiguous().numpy())
    there.sendall(header(Kind.TENSOR, memoryview(half), epoch=EPOCH, number=0) + half)
    there.sendall(header(Kind.TENSOR, PAYLOAD, epoch=EPOCH, number=1) + PAYLOAD)
    with pytest.raises(BadFrame, match="has 1024 bytes"):
        in_tiles(sums_of({1: link}, 0), x, 2, 0.0)


def test_a_later_tile_that_is_damaged_is_refused(pair: tuple[Link, socket.socket]) -> None:
    link, there = pair
    half = bytes(torch.ones(4, 32).numpy())
    for number in range(2):
        there.sendall(header(Kind.TENSOR, memoryview(half), epoch=EPOCH, number=number) + half[:-1] + bytes([number]))
    with pytest.raises(BadFrame, match="damaged"):
        in_tiles(sums_of({1: link}, 0), torch.ones(4, 64), 2, 0.0)


def test_a_connection_that_is_closed_here_hands_nothing_to_who_has_its_number_next(
    pair: tuple[Link, socket.socket],
) -> None:
    """Another thread ends the replica between two sums of a program, and opens something else."""
    link, _ = pair
    sums = sums_of({1: link}, 0)
    sums.begin()
    number = link.socket.fileno()
    link.close()
    one, other = socket.socketpair()
    with one, other:
        assert number in (one.fileno(), other.fileno())
        ticket = np.zeros(1, np.int64)
        threads.run(sums.function, sums.arguments(X.clone(), int(ticket.ctypes.data)), 1)
        with pytest.raises(PeerFailed):
            sums.end()
        for end in (one, other):
            end.setblocking(False)
            with pytest.raises(BlockingIOError):
                end.recv(1)


def test_memory_for_frames_is_made_again_after_it_was_let_go(make_meshes: MakeMeshes) -> None:
    sums = [sums_of(mesh.of(Channel.COMPUTE), rank) for rank, mesh in enumerate(make_meshes(2))]
    for size in (10, 100_000, 10):
        xs = [torch.full((size,), float(rank + 1)) for rank in range(2)]
        at_once([partial(all_reduce, sums[rank], x) for rank, x in enumerate(xs)])
        assert all((x == 3.0).all() for x in xs)
        for one in sums:
            one.release()


def test_a_link_that_is_closed_already_is_an_error(pair: tuple[Link, socket.socket]) -> None:
    pair[0].close()
    with pytest.raises(PeerFailed, match="rank 1: the connection with it was ended here"):
        sums_of({1: pair[0]}, 0)
