"""Tells the free memory and the cores of this node, and where others reach what listens on it. No Ray here."""

import ipaddress
import os
from pathlib import Path

import psutil

from placement.measured.cgroup import container_available, usable_cores

# What the drivers of GPUs make in /dev: of NVIDIA's cards, of Windows' for Linux within it, of Jetsons, of AMD's cards,
# which PyTorch calls CUDA devices too. No environment variable hides them.
_GPU_DEVICES = ("nvidia[0-9]*", "dxg", "nvhost-gpu", "nvgpu", "kfd")


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
