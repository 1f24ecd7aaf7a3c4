"""Ranks of a replica in threads of this process, joined over real connections."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from placement.model.part import Part, Span
from workers.replica.membership import Membership
from workers.replica.roster import Roster
from workers.transport.mesh import TOKEN_BYTES, listen

READY_S = 60.0


@contextmanager
def joined(stages: tuple[int, ...]) -> Iterator[list[Membership]]:
    """All ranks of a replica, over real connections, given how many each stage has."""
    nothing = Span(0, 0)
    parts = tuple(
        Part(layers=Span(stage, stage + 1), kv_heads=nothing, ffn_columns=nothing, vocab_rows=nothing)
        for stage, count in enumerate(stages)
        for _ in range(count)
    )
    listeners = [listen("127.0.0.1") for _ in parts]
    addresses = tuple(listener.getsockname()[:2] for listener in listeners)
    rosters = [Roster(rank=at, parts=parts, addresses=addresses, token=bytes(TOKEN_BYTES)) for at in range(len(parts))]

    def join(rank: int) -> Membership:
        return Membership.join(listeners[rank], rosters[rank], epoch=1)

    with ThreadPoolExecutor(len(parts)) as pool:
        members = list(pool.map(join, range(len(parts)), timeout=READY_S))
    for listener in listeners:
        listener.close()
    try:
        yield members
    finally:
        for member in members:
            member.leave("the test ends")
