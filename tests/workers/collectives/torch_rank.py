"""A rank as a process of its own, which sums by gloo, again and again, until told to stop or another is lost.

    python -m tests.workers.collectives.torch_rank RANK NUMBER_OF_ITS_SOCKET PORT_OF_EACH_RANK...

It prints ``ready`` once it sums, and at the end when it knew that a rank was lost, which, and why.
"""

import itertools
import socket
import sys
import time

import torch

from kernels.cpu.layers.partial import Partial
from placement.model.part import Part, Span
from workers.collectives.backends import open_torch_group
from workers.collectives.gloo_group import GlooGroup
from workers.replica.membership import Membership
from workers.replica.roster import Roster
from workers.transport.errors import PeerFailed
from workers.transport.mesh import TOKEN_BYTES

NUM_SUMS_UNTIL_READY = 20


def join(rank: int, number: int, ports: list[int]) -> Membership:
    """With all other ranks of the only stage."""
    nothing = Span(0, 0)
    part = Part(layers=Span(0, 1), kv_heads=nothing, ffn_columns=nothing, vocab_rows=nothing)
    roster = Roster(
        rank=rank,
        parts=(part,) * len(ports),
        addresses=tuple(("127.0.0.1", port) for port in ports),
        token=bytes(TOKEN_BYTES),
    )
    with socket.socket(fileno=number) as listener:
        listener.setblocking(False)
        return Membership.join(listener, roster, epoch=1)


def sum_on(group: GlooGroup) -> None:
    """Raises PeerFailed, and AssertionError for a wrong sum."""
    for number in itertools.count():
        x = torch.full((1 << (10 if number % 3 else 17),), float(group.rank + number))
        group.begin_reduce(Partial(update=x)).result() if number % 2 else group.all_reduce(x)
        assert x[0] == x[-1] == sum(range(group.num_ranks)) + number * group.num_ranks, (number, x)
        if number == NUM_SUMS_UNTIL_READY:
            print("ready", flush=True)


def main() -> None:
    """Until a rank is lost."""
    rank, number, *ports = map(int, sys.argv[1:])
    member = join(rank, number, ports)
    group = open_torch_group(member.group, host="127.0.0.1", device=torch.device("cpu"))
    assert isinstance(group, GlooGroup), group
    try:
        sum_on(group)
    except PeerFailed as error:
        print("lost", time.monotonic(), error.rank, error.cause, flush=True)
    finally:
        group.close()
        member.leave("a rank was lost")


if __name__ == "__main__":
    main()
