"""Finds out how much memory the control groups of a process leave it. Pure: the caller reads the files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

ReadText = Callable[[str], str | None]
"""Returns the text of a file, or None where there is no such file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """The file names of a version of control groups. ``file_cache`` names lines of ``memory.stat``."""

    root: str
    limit: str
    usage: str
    file_cache: tuple[str, str]


_V1 = _Files(
    root="/sys/fs/cgroup/memory",
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    file_cache=("total_active_file", "total_inactive_file"),
)
_V2 = _Files(
    root="/sys/fs/cgroup",
    limit="memory.max",
    usage="memory.current",
    file_cache=("active_file", "inactive_file"),
)


def container_available(read: ReadText) -> int | None:
    """Returns the bytes that the control groups of this process leave it; None where none of them has a limit.

    A limit holds for all the groups below, so every group from the process's own up to the root counts. A container
    often sees its own group as the root, while the path is the one that the host knows.
    """
    available = []
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            files = _V1 if controllers else _V2
            own = PurePosixPath(files.root + path)
            groups = [own, *own.parents]
            available += [_available(read, group, files) for group in groups if group.is_relative_to(files.root)]
    return min((size for size in available if size is not None), default=None)


def _available(read: ReadText, group: PurePosixPath, files: _Files) -> int | None:
    """Returns the bytes that one group leaves; None where it has no limit."""
    limit, usage = read(f"{group}/{files.limit}"), read(f"{group}/{files.usage}")
    if limit is None or usage is None or not limit.strip().isdecimal():  # v2 writes "max" for no limit
        return None
    # The page cache of files (such as a checkpoint just read) counts as usage, but is given up on demand.
    stat = dict(line.split(" ", 1) for line in (read(f"{group}/memory.stat") or "").splitlines())
    cache = sum(int(stat.get(name, 0)) for name in files.file_cache)
    return max(0, int(limit) - max(0, int(usage) - cache))
