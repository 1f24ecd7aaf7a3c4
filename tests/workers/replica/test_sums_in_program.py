"""All-reduces as operations of the layers' program: the bits of those that stop it, and what ends it."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from placement.measured.collectives import AllReduceTable
from placement.measured.overlap import OverlapTable
from tests.support.oracle import WIDE
from tests.support.ranks import Ranks, ranks
from workers.collectives.direct_sums import CompiledAllReduce
from workers.collectives.group import TensorGroup
from workers.replica import membership as memberships
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput
from workers.transport.errors import PeerFailed
from workers.transport.link import Link

TOKEN_IDS = [i * 31 % 509 for i in range(300)]
LENGTHS = (1, 10, 33, 150, 300)
SHARES = ((1, 1), (3, 1), (9, 1), (2, 1, 1))  # of 9 : 1 the second rank has columns but no heads


@pytest.fixture
def path(llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]) -> Path:
    path = llama_checkpoint(**WIDE)
    assert make_runner(path, torch.bfloat16).is_program
    return path


@pytest.fixture
def num_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of column tiles of every all-reduce that a program was asked for."""
    found: list[int] = []
    choose = AllReduceTable.num_strips

    def counted(table: AllReduceTable, num_bytes: int, most: int) -> int:
        found.append(choose(table, num_bytes, most))
        return found[-1]

    monkeypatch.setattr(AllReduceTable, "num_strips", counted)
    yield found


def set_table(cut: Ranks, transfer_s: float) -> None:
    """All sums are direct, and take so long."""
    table = AllReduceTable(sizes=(1, 2), names=("direct",) * 2, seconds=(0.0, transfer_s / 1000))
    for rank in range(cut.num_ranks):
        cut.membership(rank).group.table = table
        cut.membership(rank).group._in_tiles = True


def log_probs(cut: Ranks) -> list[Tensor]:
    return [cut.log_probs(TOKEN_IDS[:count], ((7, 7 + count),)) for count in LENGTHS]


@pytest.mark.parametrize("shares", SHARES)
def test_the_bits_are_those_of_sums_that_stop_the_program(
    path: Path, monkeypatch: pytest.MonkeyPatch, num_tiles: list[int], shares: tuple[int, ...]
) -> None:
    with ranks(path, shares, dtype=torch.bfloat16) as cut:
        assert all(cut.runner(rank).is_program for rank in range(len(shares)))
        within = log_probs(cut)
        with monkeypatch.context() as patch:
            patch.setattr(TensorGroup, "in_program", lambda *_: None)
            for mine, other in zip(within, log_probs(cut), strict=True):
                assert torch.equal(mine, other)
    assert not num_tiles, "nobody has agreed on tiles"
    with ranks(path, shares, dtype=torch.bfloat16) as cut:
        set_table(cut, 1e-4)
        for mine, other in zip(within, log_probs(cut), strict=True):
            assert torch.equal(mine, other)
    assert {1, 2, 4, 8} == set(num_tiles)


def test_a_rank_with_nothing_of_the_layers_sums_with_programs(path: Path) -> None:
    with ranks(path, (1, 0), dtype=torch.bfloat16) as cut, ranks(path, (1,), dtype=torch.bfloat16) as whole:
        assert [cut.runner(rank).is_program for rank in range(2)] == [True, False]
        for mine, other in zip(log_probs(cut), log_probs(whole), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("without", [None, 0, 1])
def test_ranks_agree_on_tiles_unless_one_has_no_program(
    path: Path, monkeypatch: pytest.MonkeyPatch, without: int | None
) -> None:
    """One rank of another kind of CPU: it computes layer by layer, the others by programs with whole sums."""

    def is_program(runner: ModelRunner) -> bool:
        ranks_seen.append(runner._group.rank)
        if runner._group.rank == without:
            object.__setattr__(runner._weights, "fused", None)
        return runner._weights.fused is not None

    ranks_seen: list[int] = []
    monkeypatch.setattr(ModelRunner, "is_program", property(is_program))
    with ranks(path, (1, 1), dtype=torch.bfloat16, measures=True) as cut:
        assert sorted(ranks_seen) == [0, 1]
        groups = [cut.membership(rank).group for rank in range(2)]
        assert [group._in_tiles for group in groups] == [without is None] * 2
        mixed = log_probs(cut)
    with ranks(path, (1, 1)) as exact:
        for found, expected in zip(mixed, log_probs(exact), strict=True):
            assert (found - expected).norm() < 0.1 * expected.norm()


def test_tiles_are_what_ranks_measured_and_agreed_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, num_tiles: list[int]
) -> None:
    """Over links that are slow for the size of the sums; two stages, each of two ranks."""
    slow = AllReduceTable(sizes=(1, 2), names=("direct",) * 2, seconds=(0.0, 1e-7))
    monkeypatch.setattr(memberships, "measure", lambda _: slow)
    with ranks(path, (3, 1), (1, 1), dtype=torch.bfloat16, measures=True) as cut:
        for rank in range(4):
            cut.runner(rank).overlap = OverlapTable()
        num_tiles.clear()
        found = log_probs(cut)
        assert max(num_tiles) == 8
    with ranks(path, (3, 1), (1, 1), dtype=torch.bfloat16) as cut:
        for mine, other in zip(found, log_probs(cut), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_rank_that_does_not_come_is_given_up_by_whichever_thread_waits_for_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    with ranks(path, (1, 1), dtype=torch.bfloat16) as cut, socket.create_server(("127.0.0.1", 0)) as listener:
        runner = cut.runner(0)
        link = Link(socket.create_connection(listener.getsockname()), peer=1, epoch=1)
        silent = CompiledAllReduce(rank=0, links={1: link}, timeout_s=0.5, alive=lambda: None)
        monkeypatch.setattr(cut.membership(0).group, "in_program", lambda _: silent)
        step = runner.lay_out(Batch(sequences=(SequenceInput(token_ids=TOKEN_IDS, start=0, runs=((7, 307),)),)))
        embedded = torch.ones(len(TOKEN_IDS), runner.hidden_size, dtype=torch.bfloat16)
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            with pytest.raises(PeerFailed, match="rank 1: did not answer in time"):
                runner.forward(step, embedded)
        finally:
            torch.set_num_threads(before)
            link.close()


def test_a_rank_that_goes_ends_the_program_and_is_named(path: Path) -> None:
    """The operations after the all-reduce that fails are skipped: they would compute with what is not there."""
    with ranks(path, (1, 1), dtype=torch.bfloat16, checks=False) as cut:
        cut.log_probs(TOKEN_IDS, ((7, 7 + len(TOKEN_IDS)),))
        step = cut.runner(0).lay_out(Batch(sequences=(SequenceInput(token_ids=TOKEN_IDS, start=0, runs=((7, 307),)),)))
        cut.membership(1).leave("it goes")
        began_s = time.monotonic()
        with pytest.raises(PeerFailed, match=r"rank 1: (it goes|closed)"), torch.inference_mode():
            cut.runner(0).forward(step)
        assert time.monotonic() - began_s < 3.0
