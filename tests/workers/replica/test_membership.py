"""What a rank knows of its stage once all are ready."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from placement.measured.collectives import MEASURED_BYTES
from placement.measured.measurements import NOTHING_MEASURED
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.memberships import READY_S, joined
from workers.collectives.algorithms import ALL_REDUCES
from workers.collectives.backends import Library


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
            one.result(READY_S)
        assert {rank for rank, member in enumerate(members) if member.measured.sums} == telling
        for rank in telling:
            sums = members[rank].measured.sums
            assert tuple(measured.num_bytes for measured in sums) == MEASURED_BYTES
            assert all(
                measured.algorithm in (*ALL_REDUCES, Library.GLOO) and measured.duration_s > 0 for measured in sums
            )
            # All ranks of a stage must choose alike.
            assert members[rank + 1].group.table == members[rank].group.table


def test_a_rank_says_what_it_does_until_it_is_ready_and_a_stage_says_its_links_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    phases: list[list[pb.LoadPhase.ValueType]] = [[], []]
    with joined((2,)) as members, ThreadPoolExecutor(2) as pool, caplog.at_level(logging.INFO):
        ready = [pool.submit(member.get_ready, enter=said.append) for member, said in zip(members, phases, strict=True)]
        for one in ready:
            one.result(READY_S)
    assert phases == [[pb.LOAD_PHASE_COMPILE, pb.LOAD_PHASE_CONNECT, pb.LOAD_PHASE_MEASURE]] * 2
    (line,) = [message for message in caplog.messages if "measured" in message]
    assert re.fullmatch(r"Links measured: [\d.e+-]+ ms, [\d.e+-]+ GB/s\.", line), "the table is for those who debug"
