"""What a rank knows of its stage once all are ready."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from placement.collectives import MEASURED_BYTES
from placement.measurements import NOTHING_MEASURED
from placement.plan import Part, Span
from workers.collectives.algorithms import ALL_REDUCES
from workers.membership import Membership
from workers.roster import Roster
from workers.transport.mesh import TOKEN_BYTES, listen

_READY_S = 60.0


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
        members = list(pool.map(join, range(len(parts)), timeout=_READY_S))
    for listener in listeners:
        listener.close()
    try:
        yield members
    finally:
        for member in members:
            member.leave("the test ends")


@pytest.mark.parametrize(
    ("stages", "telling"),
    [((2, 2), {0, 2}), ((2, 1), {0}), ((1, 3), {1}), ((1, 1), set())],
    ids=["two and two", "two and one", "one and three", "one and one"],
)
def test_the_first_rank_of_each_stage_of_several_tells_what_was_measured(
    stages: tuple[int, ...], telling: set[int]
) -> None:
    with joined(stages) as members, ThreadPoolExecutor(len(members)) as pool:
        assert all(member.measured == NOTHING_MEASURED for member in members)
        for one in [pool.submit(member.get_ready) for member in members]:
            one.result(_READY_S)
        assert {rank for rank, member in enumerate(members) if member.measured.sums} == telling
        for rank in telling:
            sums = members[rank].measured.sums
            assert tuple(measured.num_bytes for measured in sums) == MEASURED_BYTES
            assert all(measured.algorithm in ALL_REDUCES and measured.duration_s > 0 for measured in sums)
            # All ranks of a stage must choose alike.
            assert members[rank + 1].group.table == members[rank].group.table
