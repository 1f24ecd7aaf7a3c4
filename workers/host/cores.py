"""Which CPUs a rank computes on. Ranks of one machine take CPUs of their own, so that none runs in another's caches.

A CPU is what the kernel numbers: a hardware thread. Those of one core share its arithmetic units, so a rank takes one
of each core before it takes a second of any. A CPU is claimed by a lock on a file, which the system lets go of when
the process ends, however it ends.
"""

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """CPUs that are this process's until it ends, or releases them.

    Attributes:
        cpus: none where there were not enough.
        locks: open files, which hold the claim as long as they are open.
    """

    cpus: frozenset[int]
    locks: tuple[int, ...]

    def pin(self) -> None:
        """Keep the calling thread, and those that it starts from now on, to the CPUs."""
        if not self.cpus:
            return
        try:
            os.sched_setaffinity(0, self.cpus)
        except OSError as error:  # the CPUs were taken from this process since
            logger.warning("cores_not_pinned cause=%r", str(error))

    def release(self) -> None:
        """Let others have the CPUs. Once, when no thread works there any more."""
        for lock in self.locks:
            os.close(lock)


def parse_cpus(text: str) -> frozenset[int]:
    """CPUs as the kernel lists them, such as ``0-2,8``. Raises ValueError for anything else."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def cores_of(allowed: Iterable[int], siblings: Mapping[int, str]) -> list[list[int]]:
    """The CPUs of each core, lowest first, and cores by their lowest.

    Args:
        allowed: CPUs to sort; others do not count.
        siblings: what the kernel lists as those of a CPU's core, by CPU. One whose list is missing or cannot be read
            has a core to itself.
    """
    left = set(allowed)
    cores: list[list[int]] = []
    while left:
        cpu = min(left)
        try:
            core = parse_cpus(siblings.get(cpu, "")) & left | {cpu}
        except ValueError:
            core = frozenset({cpu})
        cores.append(sorted(core))
        left -= core
    return cores


def beside(cores: Iterable[Sequence[int]], taken: Collection[int]) -> list[int]:
    """The second and further CPUs of cores, in the order to take them: first beside ``taken``, where nobody else is."""
    ordered = sorted(cores, key=lambda core: core[0] not in taken)
    return [cpu for core in ordered for cpu in core[1:]]


def claim_cores(
    count: int,
    *,
    directory: Path | None = None,
    allowed: Collection[int] | None = None,
    siblings: Mapping[int, str] | None = None,
) -> Claim:
    """Claims ``count`` CPUs that no other rank of this machine and user has, of as many cores as it can; or none.

    Args:
        directory: where the locks are. Default: one of this user's, in the directory for temporary files.
        allowed: CPUs to choose from. Default: those that this process may run on.
        siblings: the CPUs of each one's core, see :func:`cores_of`. Default: what this machine's kernel says.
    """
    if allowed is None:
        allowed = os.sched_getaffinity(0)
    cores = cores_of(allowed, _siblings(allowed) if siblings is None else siblings)
    if directory is None:
        directory = Path(tempfile.gettempdir()) / f"heterodyne-cores-{os.getuid()}"
    locks: dict[int, int] = {}
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        _check_own(directory)
        _lock(locks, count, directory, [core[0] for core in cores])
        _lock(locks, count, directory, beside(cores, locks))
    except OSError as error:
        logger.warning("cores_not_claimed cause=%r", str(error))
    if len(locks) < count:
        logger.info("cores_not_pinned threads=%d free_cpus=%d", count, len(locks))
        for lock in locks.values():
            os.close(lock)
        return Claim(cpus=frozenset(), locks=())
    return Claim(cpus=frozenset(locks), locks=tuple(locks.values()))


def _siblings(cpus: Iterable[int]) -> dict[int, str]:
    """What the kernel lists, as far as it does."""
    found: dict[int, str] = {}
    for cpu in cpus:
        with contextlib.suppress(OSError):  # such as in a container that hides it
            found[cpu] = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    return found


def _check_own(directory: Path) -> None:
    """Raises OSError where somebody else made the directory, or a link, at a place that anybody can guess."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{directory} is not this user's own directory")


def _lock(locks: dict[int, int], count: int, directory: Path, cpus: Iterable[int]) -> None:
    """Adds locks of CPUs, in their order, to those there are, by CPU, until there are ``count``."""
    for cpu in cpus:
        if len(locks) == count:
            break
        lock = os.open(directory / str(cpu), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise
        else:
            locks[cpu] = lock
