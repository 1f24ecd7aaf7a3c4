"""Every way of summing, over real connections: the sum of all ranks, the same bits at each."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.workers.transport.conftest import MakeMeshes
from workers.collectives.algorithms import ALL_REDUCES, Peers, branches, broadcast, candidates, gather
from workers.transport.errors import PeerFailed
from workers.transport.mesh import Channel, Mesh

SIZES = (1, 2, 3, 7, 64, 1000, 300_001)


def peers_of(mesh: Mesh, rank: int, num_ranks: int, timeout_s: float = 20.0) -> Peers:
    return Peers(
        rank=rank,
        num_ranks=num_ranks,
        links=mesh.of(Channel.COMPUTE),
        deadline_s=time.monotonic() + timeout_s,
        alive=lambda: None,
    )


def at_once(meshes: Sequence[Mesh], call: Callable[[Peers, Tensor], None], xs: Sequence[Tensor]) -> None:
    """The same collective at every rank."""
    with ThreadPoolExecutor(len(meshes)) as pool:
        running = [
            pool.submit(call, peers_of(mesh, rank, len(meshes)), x)
            for rank, (mesh, x) in enumerate(zip(meshes, xs, strict=True))
        ]
        for one in running:
            one.result(30.0)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ALL_REDUCES)
def test_all_ranks_have_the_sum_and_the_same_bits(make_meshes: MakeMeshes, name: str, num_ranks: int) -> None:
    meshes = make_meshes(num_ranks)
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES:
            parts = [torch.randn(size, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(num_ranks)]
            expected = torch.stack([part.double() for part in parts]).sum(dim=0)
            xs = [part.clone() for part in parts]
            at_once(meshes, ALL_REDUCES[name], xs)
            assert all(torch.equal(x, xs[0]) for x in xs)
            # Each of at most num_ranks roundings is relative to a partial sum.
            bound = num_ranks * torch.finfo(dtype).eps * torch.stack([part.double().abs() for part in parts]).sum(dim=0)
            assert ((xs[0].double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", ALL_REDUCES)
def test_three_ranks_are_added_in_float32_and_rounded_once(make_meshes: MakeMeshes, name: str) -> None:
    xs = [torch.tensor([value], dtype=torch.bfloat16) for value in (1.0, 2.0**-9, 2.0**-9)]
    at_once(make_meshes(3), ALL_REDUCES[name], xs)
    assert xs[0].item() == torch.tensor(1.0 + 2.0**-8).bfloat16().item()


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 6])
def test_whichever_way_is_taken_the_bits_are_the_same(make_meshes: MakeMeshes, num_ranks: int) -> None:
    meshes = make_meshes(num_ranks)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        parts = [torch.randn(1001, generator=generator).to(dtype) for _ in range(num_ranks)]
        found = []
        for call in ALL_REDUCES.values():
            xs = [part.clone() for part in parts]
            at_once(meshes, call, xs)
            found.append(xs[0])
        assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("num_ranks", range(1, 18))
def test_a_tree_has_every_rank_below_its_parent_and_as_many_hops_as_bits(num_ranks: int) -> None:
    for rank in range(num_ranks):
        parent, children = branches(rank, num_ranks)
        below = [other for ranks in children for other in ranks]
        assert below == list(range(rank + 1, rank + 1 + len(below))), "in their order, right behind it"
        if parent is not None:
            above = next(ranks for ranks in branches(parent, num_ranks)[1] if ranks[0] == rank)
            assert list(above) == [rank, *below]
    assert len(branches(0, num_ranks)[1]) == (num_ranks - 1).bit_length()


def test_a_tree_is_measured_where_it_is_no_star() -> None:
    assert "tree" not in candidates(3) and "tree" in candidates(4)
    assert branches(0, 3)[1] == [range(1, 2), range(2, 3)]


def test_rank_0_gathers_what_each_has(make_meshes: MakeMeshes) -> None:
    meshes = make_meshes(3)
    others = {1: torch.zeros(4, 5), 2: torch.zeros(4, 2)}
    mine = [torch.zeros(4, 1), torch.ones(4, 5), torch.full((4, 2), 2.0)]

    def call(peers: Peers, x: Tensor) -> None:
        gather(peers, x, {} if peers.rank else others)

    at_once(meshes, call, mine)
    assert torch.equal(others[1], mine[1]) and torch.equal(others[2], mine[2])


def test_everyone_has_what_rank_0_broadcasts(make_meshes: MakeMeshes) -> None:
    xs = [torch.full((3,), rank) for rank in range(4)]
    at_once(make_meshes(4), broadcast, xs)
    assert all(x.tolist() == [0, 0, 0] for x in xs)


@pytest.mark.parametrize("name", ALL_REDUCES)
def test_a_rank_that_does_not_come_is_named(make_meshes: MakeMeshes, name: str) -> None:
    meshes = make_meshes(2)
    for rank in range(2):
        with pytest.raises(PeerFailed, match=f"rank {1 - rank}: did not answer in time"):
            # More than the buffers of a connection hold: star would else have sent all and gone on.
            ALL_REDUCES[name](peers_of(meshes[rank], rank, 2, timeout_s=0.3), torch.zeros(8 << 20))
