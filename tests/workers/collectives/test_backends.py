"""Which backend the ranks of a stage may use together, and what they tell each other to set it up."""

import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.workers.transport.conftest import MakeMeshes
from workers.collectives.backends import Capabilities, Library, usable_libraries
from workers.collectives.rendezvous import LinkStore, SetUpFailed
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import send
from workers.transport.mesh import Channel, Mesh

A, B = b"a" * 32, b"b" * 32


def able(gpu: bytes | None = None, *, gloo: bool = True, nccl: bool = True) -> Capabilities:
    return Capabilities(gloo=gloo, nccl=nccl and gpu is not None, gpu=gpu)


@pytest.mark.parametrize(
    ("ranks", "usable", "word"),
    [
        ([able(), able()], [Library.GLOO], None),
        ([able(A), able(B)], [Library.NCCL, Library.GLOO], None),
        ([able(A), able(A)], [Library.GLOO], "two ranks share a GPU"),
        ([able(A), able()], [Library.GLOO], "some ranks compute on the host"),
        ([able(A), able(B, nccl=False)], [Library.GLOO], "nccl: not in the torch of every rank"),
        ([able(), able(gloo=False)], [], "gloo: not in the torch of every rank"),
    ],
)
def test_what_ranks_use_together(ranks: list[Capabilities], usable: list[Library], word: str | None) -> None:
    found, reasons = usable_libraries(ranks)
    assert found == usable
    assert not reasons if word is None else word in " ".join(reasons)
    assert [Capabilities.unpack(rank.pack()) for rank in ranks] == ranks


def store_of(mesh: Mesh, timeout_s: float = 10.0) -> LinkStore:
    return LinkStore(mesh.of(Channel.COMPUTE), deadline_s=time.monotonic() + timeout_s, alive=lambda: None)


def test_what_one_rank_sets_all_get_and_nothing_is_left_on_the_links(make_meshes: MakeMeshes) -> None:
    meshes = make_meshes(3)

    def meet(rank: int) -> list[bytes]:
        for _ in range(2):
            store = store_of(meshes[rank])
            store.set(f"of {rank}", bytes([rank, 0xFF]))
            found = [store.get(f"of {other}") for other in range(3)]
            store.finish()
        return found

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(meet, range(3), timeout=30.0)) == [[b"\0\xff", b"\1\xff", b"\2\xff"]] * 3


def test_a_rank_that_cannot_go_on_tells_those_that_wait_for_it(make_meshes: MakeMeshes) -> None:
    first, second = map(store_of, make_meshes(2))

    def wait_for_more() -> None:
        with pytest.raises(SetUpFailed, match="no such interface"):
            first.get("what nobody sets")
        with pytest.raises(SetUpFailed, match="no such interface"):
            first.finish("what it waited for did not come: no such interface")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_more)
        with pytest.raises(SetUpFailed, match="no such interface"):
            second.finish("no such interface")
        waiting.result(10.0)


def test_a_key_that_nobody_will_set_is_an_error_once_all_have_ended(make_meshes: MakeMeshes) -> None:
    first, second = map(store_of, make_meshes(2))
    second._tell(1, "", b"")
    with pytest.raises(SetUpFailed, match="nobody set"):
        first.get("what nobody sets")


def test_a_rank_that_says_nothing_is_named(make_meshes: MakeMeshes) -> None:
    with pytest.raises(PeerFailed, match="rank 1: did not answer in time"):
        store_of(make_meshes(2)[0], timeout_s=0.2).get("anything")


@pytest.mark.parametrize("message", [b"", b"\0", struct.pack("<BH", 7, 0), struct.pack("<BH", 0, 9) + b"short"])
def test_what_is_no_message_of_a_rendezvous_is_refused(make_meshes: MakeMeshes, message: bytes) -> None:
    meshes = make_meshes(2)
    link = meshes[1].of(Channel.COMPUTE)[0]
    send(link, Kind.TENSOR, memoryview(message), deadline_s=time.monotonic() + 5.0)
    with pytest.raises(BadFrame):
        store_of(meshes[0]).get("anything")
