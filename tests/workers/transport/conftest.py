"""Ranks of a mesh in threads of this process, over real sockets."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from workers.transport.mesh import TOKEN_BYTES, Members, Mesh, join, listen

TOKEN = bytes(range(TOKEN_BYTES))
MakeMeshes = Callable[[int], list[Mesh]]


def addresses(listeners: list[socket.socket]) -> list[tuple[str, int]]:
    return [listener.getsockname()[:2] for listener in listeners]


def members(rank: int, listeners: list[socket.socket], *, epoch: int = 1, token: bytes = TOKEN) -> Members:
    return Members(rank=rank, addresses=addresses(listeners), epoch=epoch, token=token)


@pytest.fixture
def make_meshes() -> Iterator[MakeMeshes]:
    made: list[Mesh] = []

    def make(num_ranks: int) -> list[Mesh]:
        listeners = [listen("127.0.0.1") for _ in range(num_ranks)]
        with ThreadPoolExecutor(num_ranks) as pool:
            deadline_s = time.monotonic() + 20.0
            joining = [
                pool.submit(join, listener, members(rank, listeners), deadline_s=deadline_s)
                for rank, listener in enumerate(listeners)
            ]
            meshes = [one.result() for one in joining]
        for listener in listeners:
            listener.close()
        made.extend(meshes)
        return meshes

    yield make
    for mesh in made:
        mesh.close()
