"""Claims the CPUs that a rank computes on. Ranks of one machine claim different CPUs, and so different caches.

A CPU is a hardware thread, as the kernel numbers them. The CPUs of one core share its arithmetic units, so a rank
claims one CPU of each core before it claims a second of any. A claim is a lock on a file, which the system releases
when the process ends, in whatever manner.
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

from protos.codec.log_record import said

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """CPUs that belong to this process until it ends, or releases them.

    Attributes:
        cpus: the CPUs; empty where there were not enough.
        locks: open files, which hold the claim as long as they are open.
    """

    cpus: frozenset[int]
    locks: tuple[int, ...]

    def pin(self) -> None:
        """Restricts the calling thread, and those that it starts from now on, to the CPUs."""
        if not self.cpus:
            return
        try:
            os.sched_setaffinity(0, self.cpus)
        except OSError as error:  # the CPUs were taken from this process since
            words = "Threads are not pinned to cores, which makes steps slower now and then: %s"
            logger.warning(words, error, extra=said("cores_not_pinned", cause=str(error)))

    def release(self) -> None:
        """Releases the CPUs for others. Call it once, when no thread works there any more."""
        for lock in self.locks:
            os.close(lock)


def parse_cpus(text: str) -> frozenset[int]:
    """Parses a list of CPUs in the kernel's form, such as ``0-2,8``. Raises ValueError for anything else."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def cores_of(allowed: Iterable[int], siblings: Mapping[int, str]) -> list[list[int]]:
    """Groups CPUs by core. The lowest CPU of a core comes first, and cores are ordered by their lowest CPU.

    Args:
        allowed: the CPUs to group; others do not count.
        siblings: the kernel's list of the CPUs on the same core, for each CPU. A CPU whose list is missing or cannot be
            read has a core to itself.
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
    """Lists the second and further CPUs of cores in the order to claim them.

    Those on cores of which this rank has ``taken`` a CPU come first, since no other rank computes there.
    """
    ordered = sorted(cores, key=lambda core: core[0] not in taken)
    return [cpu for core in ordered for cpu in core[1:]]


def claim_cores(
    count: int,
    *,
    directory: Path | None = None,
    allowed: Collection[int] | None = None,
    siblings: Mapping[int, str] | None = None,
) -> Claim:
    """Claims ``count`` CPUs that no other rank of this machine and user has, on as many cores as it can; or none.

    Args:
        directory: the directory of the locks. Default: one of this user's, in the directory for temporary files.
        allowed: CPUs to choose from. Default: those that this process may run on.
        siblings: the CPUs on the same core, for each CPU: see :func:`cores_of`. Default: the lists of this machine's
            kernel.
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
        words = "Cores could not be claimed for this worker's threads: %s"
        logger.warning(words, error, extra=said("cores_not_claimed", cause=str(error)))
    if len(locks) < count:
        words = "Threads are not pinned to cores: %d were to have one each, and %d are free."
        logger.info(words, count, len(locks), extra=said("cores_not_pinned", threads=count, free_cpus=len(locks)))
        for lock in locks.values():
            os.close(lock)
        return Claim(cpus=frozenset(), locks=())
    return Claim(cpus=frozenset(locks), locks=tuple(locks.values()))


def _siblings(cpus: Iterable[int]) -> dict[int, str]:
    """Reads the kernel's list of the CPUs on the same core, for each CPU that has one."""
    found: dict[int, str] = {}
    for cpu in cpus:
        with contextlib.suppress(OSError):  # such as in a container that hides it
            found[cpu] = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    return found


def _check_own(directory: Path) -> None:
    """Raises OSError where somebody else made the directory, or a link, since anybody can guess its name."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{directory} is not this user's own directory")


def _lock(locks: dict[int, int], count: int, directory: Path, cpus: Iterable[int]) -> None:
    """Locks CPUs in their order, and adds them to ``locks`` by CPU, until there are ``count``."""
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
