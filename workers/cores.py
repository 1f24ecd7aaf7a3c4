"""Which cores a rank computes on. Ranks of one machine take cores of their own, so that none runs in another's caches.

A core is claimed by a lock on a file, which the system lets go of when the process ends, however it ends.
"""

import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Cores that are this process's as long as it holds on to the claim.

    Attributes:
        cores: none where there were not enough.
        locks: open files; closing one gives its core back.
    """

    cores: frozenset[int]
    locks: tuple[int, ...]

    def release(self) -> None:
        """Give the cores back."""
        for lock in self.locks:
            os.close(lock)

    def pin(self) -> None:
        """Keep the calling thread, and those that it starts from now on, to the cores."""
        if not self.cores:
            return
        try:
            os.sched_setaffinity(0, self.cores)
        except OSError as error:  # the cores were taken from this process since
            logger.warning("cores_not_pinned cause=%r", str(error))


def claim_cores(count: int, *, directory: Path | None = None, allowed: Sequence[int] | None = None) -> Claim:
    """Claims ``count`` cores that no other rank of this machine and user has, lowest first; or none.

    Args:
        directory: where the locks are. Default: one of this user's, in the directory for temporary files.
        allowed: cores to choose from. Default: those that this process may run on.
    """
    if allowed is None:
        allowed = sorted(os.sched_getaffinity(0))
    if directory is None:
        directory = Path(tempfile.gettempdir()) / f"heterodyne-cores-{os.getuid()}"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        _check_own(directory)
        locks = _lock(count, directory, allowed)
    except OSError as error:
        logger.warning("cores_not_claimed cause=%r", str(error))
        locks = {}
    if len(locks) < count:
        for lock in locks.values():
            os.close(lock)
        return Claim(cores=frozenset(), locks=())
    return Claim(cores=frozenset(locks), locks=tuple(locks.values()))


def _check_own(directory: Path) -> None:
    """Raises OSError where somebody else made the directory, or a link, at a place that anybody can guess."""
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{directory} is not this user's own directory")


def _lock(count: int, directory: Path, allowed: Sequence[int]) -> dict[int, int]:
    """Locks of at most ``count`` cores, by core."""
    locks: dict[int, int] = {}
    for core in allowed:
        if len(locks) == count:
            break
        lock = os.open(directory / str(core), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            locks[core] = lock
    return locks
