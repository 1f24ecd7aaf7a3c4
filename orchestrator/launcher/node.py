"""Tells the free memory and the cores of this node, and where others reach what listens on it. No Ray here."""

import ctypes
import ipaddress
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from placement.measured.cgroup import container_available, usable_cores
from placement.measured.core_share import CoreShare, read_core_share
from placement.measured.targets import TARGET_VARIABLE, chosen_target, runnable_targets

# What the drivers of GPUs make in /dev: of NVIDIA's cards, of Windows' for Linux within it, of Jetsons, of AMD's cards,
# which PyTorch calls CUDA devices too. No environment variable hides them.
_GPU_DEVICES = ("nvidia[0-9]*", "dxg", "nvhost-gpu", "nvgpu", "kfd")

# Linux's numbers for x86-64: arch_prctl(ARCH_GET_XCOMP_SUPP), and the bit of XFEATURE_XTILEDATA.
_ARCH_PRCTL, _GET_SUPPORTED_STATE, _TILE_DATA = 158, 0x1021, 18


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Returns whether there is any sign of a GPU that PyTorch could use. Of a machine without one this is certain."""
    return any(next(devices.glob(pattern), None) is not None for pattern in _GPU_DEVICES)


def available_memory_bytes() -> int:
    """Returns the memory that can be allocated now, within the container's limit."""
    free = psutil.virtual_memory().available
    limit = container_available(_read)
    return free if limit is None else min(free, limit)


def available_cores() -> int:
    """Returns the cores that this process may use, by its affinity and within the container's quota."""
    return usable_cores(len(os.sched_getaffinity(0)), _read)


def core_share(num_threads: int) -> CoreShare:
    """Returns what a team of ``num_threads`` threads would have of this node's cores now."""
    allowed, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    return read_core_share(num_threads, num_allowed=allowed, num_cores=cores, read=_read)


def cpu_targets() -> tuple[str, ...]:
    """Returns the targets that this node's CPU can execute, the fastest first."""
    return runnable_targets(_read("/proc/cpuinfo") or "", gives_tiles=_gives_tiles())


def _gives_tiles() -> bool:
    """Returns whether the system gives processes the tile registers of AMX; it is not asked for them here."""
    supported, library = ctypes.c_uint64(0), ctypes.CDLL(None)
    if platform.machine() != "x86_64" or not hasattr(library, "syscall"):
        return False
    answer = library.syscall(_ARCH_PRCTL, _GET_SUPPORTED_STATE, ctypes.byref(supported))
    return bool(answer == 0 and supported.value >> _TILE_DATA & 1)


def cpu_target() -> str:
    """Returns the target that workers of this node generate code for; empty where they refuse the one that is named."""
    return chosen_target(named_target(), cpu_targets())


def named_target() -> str:
    """Returns the target that the environment names; empty where it names none."""
    return os.environ.get(TARGET_VARIABLE, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node says of itself: the memory that can be allocated now, and the target that its workers compute for."""

    memory_bytes: int
    target: str


def node_facts() -> NodeFacts:
    """Returns what this node says of itself."""
    return NodeFacts(memory_bytes=available_memory_bytes(), target=cpu_target())


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def advertised_host(bind_host: str, node_ip: str) -> str:
    """Returns where others reach a server on ``bind_host``: at the node itself for a wildcard (0.0.0.0, ::)."""
    try:
        return node_ip if ipaddress.ip_address(bind_host).is_unspecified else bind_host
    except ValueError:  # a name
        return bind_host


def host_port(host: str, port: int) -> str:
    """Returns ``host:port``, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
