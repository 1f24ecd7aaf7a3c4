"""Finds out how much memory and CPU the control groups of a process leave it. Pure: the caller reads the files."""

from collections.abc import Callable, Iterator
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
# The controller is often mounted together with the one that counts time.
_V1_CPU_ROOTS = ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct")
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
    for is_v1, path in _own_groups(read, "memory"):
        files = _V1 if is_v1 else _V2
        available += [_available(read, group, files) for group in _up_to_root(files.root, path)]
    return min((size for size in available if size is not None), default=None)


def usable_cores(num_allowed: int, read: ReadText) -> int:
    """Returns how many cores keep this process busy without being throttled; at least 1.

    A container's limit, such as that of ``docker --cpus`` or of Kubernetes, is a quota of time on any of the cores: it
    leaves the affinity as it is. Threads beyond it take each other's time, and all of them stand still together once
    it is used up. Part of a core counts as none, since a thread there would be held up in every period.

    Args:
        num_allowed: the CPUs that this process may run on, by its affinity.
    """
    quota = quota_cores(read)
    return max(1, num_allowed if quota is None else min(num_allowed, int(quota)))


def quota_cores(read: ReadText) -> float | None:
    """Returns how many cores the tightest quota of time is worth, such as 1.5; None where there is none."""
    quotas = (_quota_cores(read, group, is_v1=is_v1) for is_v1, group in _cpu_groups(read))
    return min((cores for cores in quotas if cores is not None), default=None)


def num_throttled(read: ReadText) -> int:
    """Counts the periods so far in which a group of this process was held up, as its quota was used up."""
    return sum(_num_throttled(read, group) for _, group in _cpu_groups(read))


def _cpu_groups(read: ReadText) -> Iterator[tuple[bool, PurePosixPath]]:
    """Yields the groups that may limit this process's time, up to the root: if by version 1, and the directory."""
    for is_v1, path in _own_groups(read, "cpu"):
        for root in _V1_CPU_ROOTS if is_v1 else (_V2.root,):
            yield from ((is_v1, group) for group in _up_to_root(root, path))


def _own_groups(read: ReadText, controller: str) -> Iterator[tuple[bool, str]]:
    """Yields the groups of this process that may limit what ``controller`` controls: if by version 1, and where."""
    for line in (read("/proc/self/cgroup") or "").splitlines():
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            yield bool(controllers), path


def _up_to_root(root: str, path: str) -> list[PurePosixPath]:
    """Returns the directories of a group and of all those above it."""
    own = PurePosixPath(root + path)
    return [group for group in (own, *own.parents) if group.is_relative_to(root)]


def _quota_cores(read: ReadText, group: PurePosixPath, *, is_v1: bool) -> float | None:
    """Returns the cores that one group's quota is worth; None where it has none."""
    if is_v1:  # a quota of -1 is none
        words = [(read(f"{group}/cpu.cfs_{name}_us") or "").strip() for name in ("quota", "period")]
    else:
        words = (read(f"{group}/cpu.max") or "").split()  # a quota of "max" is none
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        return None
    quota, period = map(int, words)
    return quota / period


def _num_throttled(read: ReadText, group: PurePosixPath) -> int:
    """Counts the periods in which one group was held up; both versions write them alike."""
    lines = (line.split() for line in (read(f"{group}/cpu.stat") or "").splitlines())
    return next((int(words[1]) for words in lines if len(words) == 2 and words[0] == "nr_throttled"), 0)


def _available(read: ReadText, group: PurePosixPath, files: _Files) -> int | None:
    """Returns the bytes that one group leaves; None where it has no limit."""
    limit, usage = read(f"{group}/{files.limit}"), read(f"{group}/{files.usage}")
    if limit is None or usage is None or not limit.strip().isdecimal():  # v2 writes "max" for no limit
        return None
    # The page cache of files (such as a checkpoint just read) counts as usage, but is given up on demand.
    stat = dict(line.split(" ", 1) for line in (read(f"{group}/memory.stat") or "").splitlines())
    cache = sum(int(stat.get(name, 0)) for name in files.file_cache)
    return max(0, int(limit) - max(0, int(usage) - cache))
