"""Asks the system for memory page by page: it is all zeros, and none of it is taken before it is written."""

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def map_zeros(num_bytes: int) -> Tensor:
    """Returns zeroed bytes, at least one, on huge pages where there is room for one and the system has them.

    Reads of a large tensor then walk the page tables less. The memory lives as long as the tensor.

    Raises:
        MemoryError: the system refuses so much.
    """
    spare = HUGE_PAGE if num_bytes >= HUGE_PAGE else 0
    try:
        memory = mmap.mmap(-1, num_bytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"can't allocate memory: {num_bytes} bytes ({error})") from error
    mapped = torch.frombuffer(memory, dtype=torch.uint8)
    start = -mapped.data_ptr() % HUGE_PAGE if spare else 0
    if spare and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the system was built without huge pages
            # Only whole pages: the last would take up to 2 MiB more than was planned.
            memory.madvise(mmap.MADV_HUGEPAGE, start, num_bytes // HUGE_PAGE * HUGE_PAGE)
    return mapped[start : start + num_bytes]
