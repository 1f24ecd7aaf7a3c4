"""Sums on GPUs, with gloo for NCCL and streams that note what is asked of them: the host waits once a step alone."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kernels.cpu.layers.partial import Partial
from tests.support.memberships import READY_S, joined
from workers.collectives.backends import Library, open_torch_group
from workers.collectives.nccl_group import NcclGroup
from workers.replica.membership import Membership
from workers.transport.errors import PeerFailed

HOST = torch.device("cpu")


class Event:
    """Of a device that is done after a few looks, or never."""

    num_looks = 3

    def query(self) -> bool:
        self.num_looks -= 1
        return self.num_looks < 0


class Stream:
    """Notes who waits for what."""

    def __init__(self) -> None:
        self.waits: list[object] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waits.append(other)

    def wait_event(self, event: Event) -> None:
        self.waits.append(event)

    def record_event(self) -> Event:
        return Event()


@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The stream that computes; all others are made of the same kind."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(Event, "num_looks", 3)
    return stream


@pytest.fixture
def pair(computing: Stream) -> Iterator[list[tuple[Membership, NcclGroup]]]:
    """Two ranks."""
    with joined((2,)) as members, ThreadPoolExecutor(2) as pool:
        opening = [pool.submit(open_torch_group, m.group, host="127.0.0.1", device=HOST) for m in members]
        pairs = []
        for member, one in zip(members, opening, strict=True):
            gloo = one.result(READY_S)
            assert gloo is not None and gloo._backend is not None
            nccl = NcclGroup(
                backend=gloo._backend,
                rank=member.group.rank,
                members=(0, 1),
                pulse=member.pulse,
                widths=(2, 3),
            )
            member.group.use_on_device(Library.NCCL.value, nccl, HOST)
            pairs.append((member, nccl))
        yield pairs
        for _, nccl in pairs:
            nccl.close()


def test_the_stream_that_asks_for_a_sum_waits_and_the_step_settles(
    pair: list[tuple[Membership, NcclGroup]], computing: Stream
) -> None:
    def step(rank: int) -> tuple[Tensor, Tensor | None]:
        group = pair[rank][0].group
        x, y = torch.full((1000,), 1.0 + rank), torch.full((7,), 10.0 + rank)
        begun = group.begin_reduce(Partial(update=x))
        group.all_reduce(y)
        assert begun.done()
        begun.result()
        group.settle()
        return torch.cat([x, y]), group.gather_columns(torch.full((1, 2 + rank), float(rank)))

    with ThreadPoolExecutor(2) as pool:
        (first, logits), (second, nothing) = pool.map(step, range(2), timeout=READY_S)
    assert torch.equal(first, second) and first.tolist() == [3.0] * 1000 + [21.0] * 7
    assert logits is not None and logits.tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]] and nothing is None
    sides = [nccl._side for _, nccl in pair]
    assert all(computing in side.waits for side in sides), "a sum that is begun waits for what it sums"
    assert any(isinstance(waited, Event) for waited in computing.waits), "and is waited for on the stream"
    assert all(side in computing.waits for side in sides)


def test_a_device_that_never_gets_there_is_left_when_a_rank_is_lost(
    pair: list[tuple[Membership, NcclGroup]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Event, "num_looks", 1 << 60)
    (member, nccl), (other, _) = pair
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(nccl.settle)
        time.sleep(0.2)
        assert not waiting.done()
        other.pulse.fail("is gone")
        with pytest.raises(PeerFailed, match="rank 1: is gone"):
            waiting.result(3.0)
    with pytest.raises(PeerFailed):
        member.group.all_reduce(torch.ones(3))
