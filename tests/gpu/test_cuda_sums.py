"""Sums by NCCL: of one rank, where there is a GPU, and of two, where each has one."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed

from kernels.cpu.layers.partial import Partial
from placement.measured.collectives import unmeasured
from tests.support.memberships import READY_S, joined
from tests.support.triton.triton_cases import HAS_GPU
from workers.collectives.algorithms import direct
from workers.collectives.backends import open_torch_group
from workers.collectives.group import TensorGroup
from workers.collectives.nccl_group import NcclGroup
from workers.collectives.torch_group import LARGE_BYTES
from workers.host.device import use_device
from workers.replica.membership import Membership
from workers.transport.errors import PeerFailed
from workers.transport.pulse import Pulse

if not HAS_GPU:
    pytest.skip("torch sees no CUDA device here", allow_module_level=True)
if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
    pytest.skip("this torch has no NCCL", allow_module_level=True)

pytestmark = pytest.mark.gpu
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_a_rank_sets_nccl_up_and_gathers_what_it_has() -> None:
    device = torch.device("cuda", 0)
    group = TensorGroup(rank=0, links={}, pulse=Pulse({}), widths=(5,), table=unmeasured(1))
    nccl = open_torch_group(group, host="127.0.0.1", device=device)
    assert isinstance(nccl, NcclGroup)
    try:
        x = torch.randn(3, 5, device=device)
        whole = nccl.gather_columns(x)
        assert whole is not None and torch.equal(whole, x)
        into = torch.empty(15, device=device)
        nccl._gather(into, x.view(-1))
        nccl.begin_reduce(Partial(update=x)).result()
        nccl.settle()
        assert torch.equal(into.view(3, 5), x)
    finally:
        nccl.close()


def get_ready(member: Membership) -> None:
    device = torch.device("cuda", member.group.rank)
    use_device(device)
    member.get_ready(device=device)
    assert isinstance(member._torch, NcclGroup)
    assert set(member.group.table.names) == {"nccl"}


@needs_two
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_have_the_bits_of_our_own_sums_whatever_the_size(dtype: torch.dtype) -> None:
    def run(member: Membership) -> None:
        get_ready(member)
        group = member.group
        generator = torch.Generator().manual_seed(group.rank)
        for numel in (1, 7, 4096, LARGE_BYTES // dtype.itemsize, 1_000_001):
            ours = torch.randn(numel, generator=generator).to(dtype)
            now, beside = ours.to(group.device), ours.to(group.device)
            begun = group.begin_reduce(Partial(update=beside))
            group.run(direct, ours)
            begun.result()
            group.all_reduce(now)
            group.settle()
            assert torch.equal(now.cpu(), ours) and torch.equal(beside.cpu(), ours)

    with joined((2,)) as members, ThreadPoolExecutor(2) as pool:
        list(pool.map(run, members, timeout=READY_S))


@needs_two
def test_a_rank_that_is_lost_in_a_sum_is_named_within_seconds() -> None:
    with joined((2,)) as members, ThreadPoolExecutor(2) as pool:
        list(pool.map(get_ready, members, timeout=READY_S))
        group = members[0].group

        def wait() -> None:
            use_device(group.device)
            group.all_reduce(torch.ones(1000, device=group.device))
            group.settle()

        waiting = pool.submit(wait)
        time.sleep(0.5)
        began_s = time.monotonic()
        members[1].pulse.fail("is gone")
        with pytest.raises(PeerFailed, match="rank 1: is gone"):
            waiting.result(READY_S)
        assert time.monotonic() - began_s < 3.0
