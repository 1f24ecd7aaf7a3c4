"""Sums by gloo over real connections: the bits of every other way, at any size; and who is set up for it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from kernels.cpu.layers.partial import Finish, Partial
from tests.support.memberships import READY_S, joined
from workers.collectives import backends
from workers.collectives.algorithms import direct
from workers.collectives.backends import open_torch_group
from workers.collectives.group import TensorGroup
from workers.collectives.rendezvous import SetUpFailed
from workers.collectives.torch_group import LARGE_BYTES, TorchGroup
from workers.replica.membership import Membership
from workers.transport.errors import PeerFailed

R = TypeVar("R")
HOST = torch.device("cpu")
MakeGroups = Callable[[int], list[tuple[TensorGroup, TorchGroup]]]


def at_once(calls: Sequence[Callable[[], R]]) -> list[R]:
    """What all ranks do at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [one.result(READY_S) for one in [pool.submit(call) for call in calls]]


def opened(group: TensorGroup, host: str = "127.0.0.1") -> TorchGroup | None:
    return open_torch_group(group, host=host, device=HOST)


@pytest.fixture
def make_groups() -> Iterator[MakeGroups]:
    """Our own connections, and gloo's, of each of some ranks."""
    with ExitStack() as stack:

        def make(count: int) -> list[tuple[TensorGroup, TorchGroup]]:
            members = stack.enter_context(joined((count,)))
            groups = at_once([lambda member=member: opened(member.group) for member in members])
            pairs = []
            for member, group in zip(members, groups, strict=True):
                assert group is not None
                stack.callback(group.close)
                pairs.append((member.group, group))
            return pairs

        yield make


def awkward(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers of every size, some of them too small, too large or none at all, and zeros of both signs."""
    exponents = torch.randint(-140, 128, (numel,), generator=generator)
    x = (torch.randn(numel, generator=generator, dtype=torch.float64) * 2.0**exponents).to(torch.float32)
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), 1e-45])[: x.numel()]
    # Half of them near each other, where what is rounded off shows.
    return torch.where(torch.rand(numel, generator=generator) < 0.5, torch.randn(numel, generator=generator), x).to(
        dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_bits_are_those_of_our_own_sums_whatever_the_size(
    make_groups: MakeGroups, count: int, dtype: torch.dtype
) -> None:
    groups = make_groups(count)
    generator = torch.Generator().manual_seed(count)
    large = LARGE_BYTES // dtype.itemsize
    for numel in (1, 7, 4096, large - 1, large * 3, large + 1, 1_200_000):
        parts = [awkward(numel, dtype, generator) for _ in range(count)]
        ours, theirs = ([part.clone() for part in parts] for _ in range(2))
        at_once([lambda g=g, x=x: g.run(direct, x) for (g, _), x in zip(groups, ours, strict=True)])
        at_once([lambda g=g, x=x: g.all_reduce(x) for (_, g), x in zip(groups, theirs, strict=True)])
        bits = torch.int32 if dtype is torch.float32 else torch.int16
        assert not ours[0].isnan().all()
        for x in theirs:
            same = (x.view(bits) == ours[0].view(bits)) | (x.isnan() & ours[0].isnan())
            assert same.all(), (numel, x[~same], ours[0][~same])


def test_sums_that_are_begun_are_done_in_their_order_beside_the_computation(make_groups: MakeGroups) -> None:
    groups = make_groups(2)
    sums = [[torch.full((1000 * (1 + at),), float(at)) for at in range(8)] for _ in groups]

    def run(rank: int) -> None:
        _, group = groups[rank]
        for one in [group.begin_reduce(Partial(update=x)) for x in sums[rank]]:
            one.result(READY_S)
        group.settle()

    at_once([lambda rank=rank: run(rank) for rank in range(2)])
    assert all((x == 2 * at).all() for of_rank in sums for at, x in enumerate(of_rank))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("num_rows", [600, 601, 6])
def test_ranks_finish_their_rows_of_large_sums_and_have_those_of_all(
    make_groups: MakeGroups, count: int, num_rows: int
) -> None:
    groups = make_groups(count)
    parts = [torch.randn(num_rows, 256, dtype=torch.float32) for _ in range(count)]
    sums = [part.clone() for part in parts]
    at_once([lambda g=g, x=x: g.run(direct, x) for (g, _), x in zip(groups, sums, strict=True)])
    is_scattered = num_rows == 600  # small ones, and those that no two ranks could have as much of, are not
    finished: list[int] = []

    def run(rank: int) -> Tensor:
        update, result = parts[rank], torch.full((num_rows, 256), -1.0)

        def finish(start: int, stop: int) -> None:
            finished.append(stop - start)
            result[start:stop] = 3 * update[start:stop]

        partial = Partial(update=update, finish=Finish(result=result, rows=finish))
        _, group = groups[rank]
        group.begin_reduce(partial).result(READY_S) if rank % 2 else group.reduce(partial)
        assert partial.is_finished is is_scattered
        return result if is_scattered else 3 * update

    for found in at_once([lambda rank=rank: run(rank) for rank in range(count)]):
        assert torch.equal(found, 3 * sums[0])
    assert finished == ([num_rows // count] * count if is_scattered else [])


def test_rank_0_gathers_columns_of_any_width(make_groups: MakeGroups) -> None:
    groups = make_groups(3)
    widths = (2, 0, 5)
    for _, group in groups:
        group._widths = widths
    parts = [torch.randn(4, width) for width in widths]
    whole, *others = at_once([lambda g=g, x=x: g.gather_columns(x) for (_, g), x in zip(groups, parts, strict=True)])
    assert whole is not None and torch.equal(whole, torch.cat(parts, dim=1)) and others == [None, None]


def test_a_rank_that_lives_is_waited_for(make_groups: MakeGroups) -> None:
    (_, first), (_, second) = make_groups(2)

    def come_late() -> None:
        time.sleep(2.5)  # longer than the silence of a rank that is lost
        second.all_reduce(torch.ones(3))

    x = torch.ones(3)
    at_once([lambda: first.all_reduce(x), come_late])
    assert x.tolist() == [2.0, 2.0, 2.0]


def test_a_wait_ends_when_the_group_does_and_so_does_every_one_after_it(make_groups: MakeGroups) -> None:
    (_, first), _ = make_groups(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.all_reduce, torch.ones(3))
        time.sleep(0.3)
        first.close()
        with pytest.raises(PeerFailed, match="rank 1: the connection with it was ended here"):
            waiting.result(2.0)
    with pytest.raises(PeerFailed):
        first.all_reduce(torch.ones(3))


@pytest.mark.parametrize("bad_rank", [0, 1, 2])
def test_where_one_rank_cannot_listen_all_go_on_without_and_say_why(
    bad_rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    hosts = ["127.0.0.1"] * 3
    hosts[bad_rank] = "192.0.2.1"  # of no interface here
    with joined((3,)) as members, caplog.at_level(logging.INFO):
        calls = [lambda m=member, h=host: opened(m.group, h) for member, host in zip(members, hosts, strict=True)]
        assert at_once(calls) == [None, None, None]
        assert caplog.text.count("Sums go without gloo: ") == 3
        # What was said meanwhile is all read: the links carry sums again.
        xs = [torch.ones(5) for _ in members]
        at_once([lambda m=member, x=x: m.group.all_reduce(x) for member, x in zip(members, xs, strict=True)])
        assert all((x == 3).all() for x in xs)


def test_a_library_that_hangs_while_it_is_set_up_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over = threading.Event()

    def hang(*_: object) -> None:
        is_over.wait(READY_S)
        raise SetUpFailed("the test ends")

    monkeypatch.setattr(backends, "_make", hang)
    monkeypatch.setattr(backends, "_HANGS_S", 0.3)
    with joined((2,)) as members:

        def open_at(member: Membership) -> None:
            with pytest.raises(PeerFailed, match="did not answer in time"):
                opened(member.group)

        began_s = time.monotonic()
        at_once([lambda member=member: open_at(member) for member in members])
        assert time.monotonic() - began_s < 10.0
        is_over.set()
