"""Sets up a backend of torch.distributed for the ranks of a stage, where all of them have it, and logs why where not.

The backend is NCCL where each rank has a GPU of its own, and else gloo, for all-reduces on the host.
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
from protos.codec.log_record import said
from workers.collectives.algorithms import Peers
from workers.collectives.gloo_group import GlooGroup
from workers.collectives.group import COLLECTIVE_S, TensorGroup
from workers.collectives.nccl_group import NcclGroup
from workers.collectives.rendezvous import LinkStore, SetUpFailed
from workers.collectives.torch_group import Backend, TorchGroup, let_backend_wait
from workers.host.device import use_device
from workers.transport.errors import PeerFailed

logger = logging.getLogger(__name__)

SET_UP_S = 5.0
"""How long a backend may take to connect the ranks, all of which are running."""

# The store ends its waits later than a set-up should end, since ranks that have failed wait for those that still try.
_STORE_S = 3 * SET_UP_S
# A library may hang where it has no time limit of its own, while all ranks are alive.
_HANGS_S = _STORE_S + COLLECTIVE_S
_CHECK_S = 0.1
_CAPABILITIES = struct.Struct("<??32s")


class Library(StrEnum):
    """The backends, by the names that they have in an all-reduce table."""

    NCCL = "nccl"
    GLOO = "gloo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The backends that a rank could use.

    Attributes:
        gpu: 32 bytes that identify the rank's GPU among all others; None where it computes on the host.
    """

    gloo: bool
    nccl: bool
    gpu: bytes | None

    def pack(self) -> bytes:
        """Returns the bytes that :meth:`unpack` reads."""
        return _CAPABILITIES.pack(self.gloo, self.nccl, self.gpu or b"")

    @classmethod
    def unpack(cls, data: bytes) -> "Capabilities":
        """Reads the bytes that :meth:`pack` returned."""
        gloo, nccl, gpu = _CAPABILITIES.unpack(data)
        return cls(gloo=gloo, nccl=nccl, gpu=gpu if any(gpu) else None)


def usable_libraries(ranks: Sequence[Capabilities]) -> tuple[list[Library], list[str]]:
    """Returns the backends that the ranks can use together, the best first, and why the others cannot be used. Pure."""
    usable: list[Library] = []
    reasons: list[str] = []
    gpus = [rank.gpu for rank in ranks if rank.gpu is not None]
    if len(gpus) == len(ranks):
        if not all(rank.nccl for rank in ranks):
            reasons.append("nccl: not in the torch of every rank")
        elif len(set(gpus)) < len(gpus):
            reasons.append("nccl: two ranks share a GPU")
        else:
            usable.append(Library.NCCL)
    elif gpus:
        reasons.append("nccl: some ranks compute on the host")
    if all(rank.gloo for rank in ranks):
        usable.append(Library.GLOO)
    else:
        reasons.append("gloo: not in the torch of every rank")
    return usable, reasons


def open_torch_group(group: TensorGroup, *, host: str, device: torch.device) -> TorchGroup | None:
    """Opens the best backend that works for all ranks of ``group``, the same at every rank; None where none does.

    All ranks call it at the same time, on the thread that runs collectives. Raises PeerFailed.

    Args:
        host: the address that this rank listens on; backends listen on the same interface.
        device: the device of the tensors that this rank reduces.
    """
    usable, reasons = usable_libraries(_exchange_capabilities(group, device))
    for reason in reasons:
        logger.debug("Sums go without %s.", reason, extra=said("sums_without", reason=reason))
    for library in usable:
        try:
            return _open(library, group, host, device)
        except SetUpFailed as error:
            extra = said("sums_without", reason=f"{library}: {error}")
            logger.info("Sums go without %s: %s", library, error, extra=extra)
    return None


def _exchange_capabilities(group: TensorGroup, device: torch.device) -> list[Capabilities]:
    """Tells all ranks what this one could use, and returns what each could. Raises PeerFailed."""
    has_any = dist.is_available()
    gpu = None
    if device.type == "cuda":
        gpu = hashlib.sha256(str(torch.cuda.get_device_properties(device).uuid).encode()).digest()
    has_nccl = has_any and gpu is not None and dist.is_nccl_available()
    packed = Capabilities(gloo=has_any and dist.is_gloo_available(), nccl=has_nccl, gpu=gpu).pack()
    own = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    others = {rank: torch.empty_like(own) for rank in group.links}

    def exchange(peers: Peers, x: Tensor) -> None:
        peers.move(dict.fromkeys(others, x), others)

    group.run(exchange, own)
    packed_by_rank = {**others, group.rank: own}
    return [Capabilities.unpack(bytes(packed_by_rank[rank].tolist())) for rank in range(group.num_ranks)]


def _open(library: Library, group: TensorGroup, host: str, device: torch.device) -> TorchGroup:
    """Opens one backend. Raises PeerFailed and SetUpFailed.

    A thread of its own sets it up, because it connects without checking the pulse, and because threads that it starts
    stay on the cores of the thread that starts them.
    """
    alive = group.pulse.check
    store = LinkStore(group.links, deadline_s=time.monotonic() + _STORE_S, alive=alive)
    setting_up: Future[Backend] = Future()

    def make() -> None:
        try:
            work_alone()
            setting_up.set_result(_make(library, store, group, host, device))
        except BaseException as error:
            setting_up.set_exception(error)

    threading.Thread(target=make, name=library, daemon=True).start()
    try:
        _wait_for_set_up(setting_up, group)
        backend = setting_up.result()
    except PeerFailed as error:
        raise group.pulse.reason(error) from error
    kind = NcclGroup if library is Library.NCCL else GlooGroup
    members = [group.links[rank].peer if rank in group.links else -1 for rank in range(group.num_ranks)]
    return kind(backend=backend, rank=group.rank, members=members, pulse=group.pulse, widths=group.widths)


def _wait_for_set_up(setting_up: Future[Backend], group: TensorGroup) -> None:
    """Waits until a backend is set up, or is known not to be. Raises PeerFailed where a rank is lost or it hangs."""
    deadline_s = time.monotonic() + _HANGS_S
    while not wait([setting_up], _CHECK_S).done:
        group.pulse.check()
        if time.monotonic() >= deadline_s:
            raise PeerFailed.timed_out(group.links[min(group.links)].peer)


def _make(library: Library, store: LinkStore, group: TensorGroup, host: str, device: torch.device) -> Backend:
    """Makes a backend and has it run a collective once. Raises PeerFailed and SetUpFailed."""
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
    except (RuntimeError, OSError, ValueError) as error:  # gloo and NCCL raise RuntimeErrors of many kinds
        problem = cause_of(error)
    store.finish(problem)
    let_backend_wait(backend, COLLECTIVE_S)
    return backend


def _try(backend: Backend, x: Tensor) -> None:
    """Runs an all-gather of ``x`` [1]."""
    parts = x.new_empty(backend.size())
    backend._allgather_base(parts.view(-1), x.view(-1)).wait()


def _gloo(store: LinkStore, group: TensorGroup, host: str) -> Backend:
    library: Any = dist.ProcessGroupGloo
    options = library._Options()
    options._timeout = timedelta(seconds=SET_UP_S)
    options._threads = 1  # so that collectives run in the order in which they are started
    options._devices = [library.create_device(hostname=host)]
    return cast(Backend, library(store, group.rank, group.num_ranks, options))


def _nccl(store: LinkStore, group: TensorGroup, host: str) -> Backend:
    # NCCL's watchdogs would end this process, and would ask the store, which has ended, for what other ranks say.
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
    """Returns the name of the network interface that has the address of ``host``, or None."""
    found = {ipaddress.ip_address(str(info[4][0])) for info in socket.getaddrinfo(host, None)}
    for name, addresses in psutil.net_if_addrs().items():
        families = (socket.AF_INET, socket.AF_INET6)
        own = [entry.address.partition("%")[0] for entry in addresses if entry.family in families]
        if any(ipaddress.ip_address(address) in found for address in own):
            return name
    return None
