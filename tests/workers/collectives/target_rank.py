"""A rank as a process of its own, which sums by the compiled all-reduce for the target that its environment names.

    python -m tests.workers.collectives.target_rank RANK NUMBER_OF_ITS_SOCKET PORT_OF_EACH_RANK...

It prints its target, and a hash of all its sums.
"""

import hashlib
import socket
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.machine import threads
from kernels.cpu.machine.columns_ir import ColumnTile
from kernels.cpu.machine.target import chosen
from workers.collectives.direct_sums import CompiledAllReduce
from workers.transport.mesh import TOKEN_BYTES, Channel, Members, join

NUM_TILES = 4
_LIMIT_S = 60.0


def parts(num_ranks: int) -> Iterator[list[Tensor]]:
    """What is summed, time after time: a part of each rank."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for size in (1, 31, 64, 1000, 100_001):
            yield [torch.randn(size, generator=generator).to(dtype) for _ in range(num_ranks)]
        edges = torch.tensor([0.0, -0.0, 1e-39, 3e-40, torch.inf, -torch.inf, 3e38, 1.0, 2.0**-9])
        yield [edges.roll(rank).to(dtype) for rank in range(num_ranks)]


def tiled(num_ranks: int) -> list[Tensor]:
    """What is summed at the end, in column tiles: a part [7, 512] of each rank."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(7, 512, generator=generator).bfloat16() for _ in range(num_ranks)]


def digest(sums: list[Tensor]) -> str:
    """A hash of the bits; what is not a number has many."""
    found = hashlib.sha256()
    for x in sums:
        found.update(x.float().nan_to_num(7.0).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Sums, and says what came out."""
    rank, number, *ports = map(int, sys.argv[1:])
    addresses = [("127.0.0.1", port) for port in ports]
    members = Members(rank=rank, addresses=addresses, epoch=1, token=bytes(TOKEN_BYTES))
    deadline_s = time.monotonic() + _LIMIT_S
    with socket.socket(fileno=number) as listener:
        listener.setblocking(False)
        mesh = join(listener, members, deadline_s=deadline_s)
    links = mesh.of(Channel.COMPUTE)
    sums = CompiledAllReduce(
        rank=rank, links=links, timeout_s=_LIMIT_S, num_tiles=lambda _: NUM_TILES, alive=lambda: None
    )
    found = [each[rank] for each in parts(len(ports))]
    for x in found:
        sums.all_reduce(x, deadline_s=deadline_s, alive=lambda: None)
    last = tiled(len(ports))[rank]
    sums.begin()
    for tile in range(NUM_TILES):
        ticket = np.zeros(1, np.int64)
        threads.run(sums.function, sums.arguments(last, int(ticket.ctypes.data), ColumnTile(tile, NUM_TILES)), 1)
    sums.end()
    mesh.close()
    print(chosen().name, digest([*found, last]))


if __name__ == "__main__":
    main()
