"""Sets a backend of torch.distributed up for the ranks of a stage, where all of them have it, and says why where not.

NCCL where each rank has a GPU of its own; else gloo, for sums on the host.
"""

import hashlib
import ipaddress
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, cast

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.cpu.machine.threads import work_alone
from placement.errors import cause_of
from workers.collectives.algorithms import Peers
from workers.collectives.gloo_group import GlooGroup
from workers.collectives.group import COLLECTIVE_S, TensorGroup
from workers.collectives.nccl_group import NcclGroup
from workers.collectives.rendezvous import LinkStore, SetUpFailed
from workers.collectives.torch_group import Backend, TorchGroup
from workers.host.device import use_device
from workers.transport.errors import PeerFailed

logger = logging.getLogger(__name__)

SET_UP_S = 5.0
"""Longest that a backend may take to connect all ranks, which are all there."""

_LOOK_S = 0.1
_CLAIM = struct.Struct("<??32s")


class Library(StrEnum):
    """A backend, by the name that a table of sums has for it."""

    NCCL = "nccl"
    GLOO = "gloo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a rank could use.

    Attributes:
        gpu: what tells its GPU from all others; None where it computes on the host.
    """

    gloo: bool
    nccl: bool
    gpu: bytes | None

    def pack(self) -> bytes:
        """For :meth:`unpack`."""
        return _CLAIM.pack(self.gloo, self.nccl, self.gpu or b"")

    @classmethod
    def unpack(cls, data: bytes) -> "Claim":
        """What :meth:`pack` wrote."""
        gloo, nccl, gpu = _CLAIM.unpack(data)
        return cls(gloo=gloo, nccl=nccl, gpu=gpu if any(gpu) else None)


def libraries(claims: Sequence[Claim]) -> tuple[list[Library], list[str]]:
    """What ranks could use together, the best first; and why not the others, where that needs to be said. Pure."""
    usable: list[Library] = []
    reasons: list[str] = []
    gpus = [claim.gpu for claim in claims if claim.gpu is not None]
    if len(gpus) == len(claims):
        if not all(claim.nccl for claim in claims):
            reasons.append("nccl: not in the torch of every rank")
        elif len(set(gpus)) < len(gpus):
            reasons.append("nccl: two ranks share a GPU")
        else:
            usable.append(Library.NCCL)
    elif gpus:
        reasons.append("nccl: some ranks compute on the host")
    if all(claim.gloo for claim in claims):
        usable.append(Library.GLOO)
    else:
        reasons.append("gloo: not in the torch of every rank")
    return usable, reasons


def open_torch_group(group: TensorGroup, *, host: str, device: torch.device) -> TorchGroup | None:
    """All ranks of ``group`` call it at the same time, on the thread that sums. Raises PeerFailed.

    Args:
        host: the address that this rank listens on: backends open theirs on the same interface.
        device: of the tensors that this rank has summed.

    Returns:
        The best that works for all ranks, the same at every rank; None where none does.
    """
    usable, reasons = libraries(_claims(group, device))
    for reason in reasons:
        logger.info("sums without %s", reason)
    for library in usable:
        try:
            return _open(library, group, host, device)
        except SetUpFailed as error:
            logger.warning("sums without %s: %s", library, error)
    return None


def _claims(group: TensorGroup, device: torch.device) -> list[Claim]:
    """Of all ranks."""
    has_any = dist.is_available()
    gpu = None
    if device.type == "cuda":
        gpu = hashlib.sha256(str(torch.cuda.get_device_properties(device).uuid).encode()).digest()
    has_nccl = has_any and gpu is not None and dist.is_nccl_available()
    mine = Claim(gloo=has_any and dist.is_gloo_available(), nccl=has_nccl, gpu=gpu).pack()
    claims = {rank: torch.empty(_CLAIM.size, dtype=torch.uint8) for rank in group.links}

    def tell(peers: Peers, x: Tensor) -> None:
        peers.move(dict.fromkeys(claims, x), claims)

    claims[group.rank] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    own = claims.pop(group.rank)
    group.run(tell, own)
    claims[group.rank] = own
    return [Claim.unpack(bytes(claims[rank].tolist())) for rank in range(group.num_ranks)]


def _open(library: Library, group: TensorGroup, host: str, device: torch.device) -> TorchGroup:
    """Raises PeerFailed and SetUpFailed.

    On a thread of its own: it connects without a look at the pulse, and what it starts stays on its thread's cores.
    """
    alive = group.pulse.check
    # Ranks that have failed wait for those that still try.
    store = LinkStore(group.links, deadline_s=time.monotonic() + 3 * SET_UP_S, alive=alive)
    made: Future[Backend] = Future()

    def make() -> None:
        try:
            work_alone()
            made.set_result(_make(library, store, group, host, device))
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=make, name=library, daemon=True).start()
    try:
        while not wait([made], _LOOK_S).done:
            alive()
        backend = made.result()
    except PeerFailed as error:
        raise group.pulse.reason(error) from error
    kind = NcclGroup if library is Library.NCCL else GlooGroup
    members = [group.links[rank].peer if rank in group.links else -1 for rank in range(group.num_ranks)]
    return kind(backend=backend, rank=group.rank, members=members, pulse=group.pulse, widths=group.widths)


def _make(library: Library, store: LinkStore, group: TensorGroup, host: str, device: torch.device) -> Backend:
    """A backend of all ranks that has summed once. Raises PeerFailed and SetUpFailed."""
    problem = ""
    try:
        if library is Library.NCCL:
            use_device(device)
            backend = _nccl(store, group, host)
            _try(backend, torch.zeros(1, device=device))
            torch.cuda.synchronize(device)
        else:
            backend = _gloo(store, group, host)
            _try(backend, torch.zeros(1))
    except (RuntimeError, OSError, ValueError) as error:  # gloo's and NCCL's are RuntimeErrors of many kinds
        problem = cause_of(error)
    store.finish(problem)
    backend._set_default_timeout(timedelta(seconds=COLLECTIVE_S + 1.0))  # ours, which names a rank, comes first
    return backend


def _try(backend: Backend, x: Tensor) -> None:
    parts = x.new_empty(backend.size())
    backend._allgather_base(parts.view(-1), x.view(-1)).wait()


def _gloo(store: LinkStore, group: TensorGroup, host: str) -> Backend:
    library: Any = dist.ProcessGroupGloo
    options = library._Options()
    options._timeout = timedelta(seconds=SET_UP_S)
    options._threads = 1  # work is done in the order in which it is begun
    options._devices = [library.create_device(hostname=host)]
    return cast(Backend, library(store, group.rank, group.num_ranks, options))


def _nccl(store: LinkStore, group: TensorGroup, host: str) -> Backend:
    # What watches its work: it would end the process for us, and ask the store, which has ended, what others say.
    for name in ("ENABLE_MONITORING", "ASYNC_ERROR_HANDLING", "DUMP_ON_TIMEOUT", "PROPAGATE_ERROR"):
        os.environ[f"TORCH_NCCL_{name}"] = "0"
    interface = _interface(host)
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    library: Any = dist.ProcessGroupNCCL
    options = library.Options()
    options._timeout = timedelta(seconds=SET_UP_S)
    return cast(Backend, library(store, group.rank, group.num_ranks, options))


def _interface(host: str) -> str | None:
    """The network interface that has the address of ``host``."""
    found = {ipaddress.ip_address(str(info[4][0])) for info in socket.getaddrinfo(host, None)}
    for name, addresses in psutil.net_if_addrs().items():
        own = [one.address.partition("%")[0] for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
        if any(ipaddress.ip_address(address) in found for address in own):
            return name
    return None
