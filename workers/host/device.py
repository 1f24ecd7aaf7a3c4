"""Opens the device that a rank computes on: its name, its torch device, its memory, its threads."""

import ctypes
import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from placement.errors import InvalidConfig
from placement.measured.cgroup import container_available, usable_cores
from placement.model.specs import DType

TORCH_DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16}

_MAX_THREADS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An opened device.

    Attributes:
        name: ``cpu`` or ``cuda:<index>``.
        torch_device: the same device for torch.
        total_memory_bytes: all memory of the device; for a CPU, that of the machine.
        num_threads: threads that one operation may use, on the CPU.
    """

    name: str
    torch_device: torch.device
    total_memory_bytes: int
    num_threads: int

    @property
    def available_memory_bytes(self) -> int:
        """Returns the memory that can be allocated at this moment; for a CPU, within the container's limit."""
        if self.torch_device.type == "cuda":
            return torch.cuda.mem_get_info(self.torch_device)[0]
        free, limit = psutil.virtual_memory().available, container_available(read_text)
        return free if limit is None else min(free, limit)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error says that memory ran out.

    Python, the system, the CPU's allocator (by a plain RuntimeError) and CUDA's each say so differently.
    """
    by_type = isinstance(error, MemoryError | torch.OutOfMemoryError)
    by_number = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return by_type or by_number or re.search("can't allocate memory|not enough memory", str(error)) is not None


def available_cores() -> int:
    """Returns the cores that this process may use, by its affinity and within the container's quota."""
    return usable_cores(len(os.sched_getaffinity(0)), read_text)


def read_text(path: str) -> str | None:
    """Returns the text of a file of the system; None where it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return None


def open_device(name: str, num_threads: int) -> Device:
    """Opens ``cpu`` or ``cuda:<index>`` and gives this process ``num_threads`` threads for each operation.

    Raises:
        InvalidConfig: no such device on this machine, or an impossible number of threads.
    """
    if isinstance(num_threads, bool) or not 1 <= num_threads <= _MAX_THREADS:
        fix = f"Use about one thread a core: this process may use {available_cores()}."
        problem = f"is not between 1 and {_MAX_THREADS}"
        raise InvalidConfig(field="threads", value=num_threads, problem=problem, fix=fix)
    torch_device = _torch_device(name)
    torch.set_num_threads(num_threads)
    if torch_device.type == "cuda":
        total_memory_bytes = torch.cuda.mem_get_info(torch_device)[1]
    else:
        total_memory_bytes = psutil.virtual_memory().total
    return Device(name=name, torch_device=torch_device, total_memory_bytes=total_memory_bytes, num_threads=num_threads)


def _torch_device(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda:(0|[1-9][0-9]{0,3})", name):
        fix = "Use cpu, or cuda:0 for the first GPU."
        raise InvalidConfig(field="device", value=name, problem="is not the name of a device", fix=fix)
    index, num_gpus = int(name.removeprefix("cuda:")), torch.cuda.device_count()
    if index >= num_gpus:
        fix = "Use a GPU that is there, or cpu." if num_gpus else "Use cpu, or install a CUDA build of torch."
        raise InvalidConfig(field="device", value=name, problem=f"torch sees {num_gpus} GPUs here", fix=fix)
    return torch.device("cuda", index)


def use_device(device: torch.device) -> None:
    """Makes a GPU the current device of the calling thread.

    Otherwise whatever names no device, such as pinned memory, belongs to the first GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def return_freed() -> None:
    """Tells the C library to return freed memory to the system, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
