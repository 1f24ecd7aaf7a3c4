"""Decides how threads wait for each other: by spinning, or by letting others have their cores. Pure.

A thread that spins goes on at once when what it waits for is there. But where it shares its core with the very thread
that it waits for, or where its time is limited by a quota, it takes that thread's time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from placement.measured.cgroup import ReadText, quota_cores, usable_cores

MANY_SPINS = 2000
"""How often a thread of a team that has its cores for itself spins at a barrier, some 10 ns each: longer than the
others usually take, and shorter than it takes to sleep and be woken."""

FEW_SPINS = 50
"""How often it spins where cores are shared; others that run at the same time mostly arrive within that."""

MOST_WAITING = 0.1
"""The part of the time in which some thread of the machine may wait for a core before cores count as shared."""

_OPENMP_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
# By default OpenMP's threads spin so long that on a machine which also does other work they take each other's cores;
# this is long enough to bridge the gap between two operations of a step.
_OPENMP_SPINS = "1000"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreShare:
    """What a team of threads has of the cores of its machine.

    Attributes:
        num_threads: the threads of the team.
        usable_cores: the cores that their process may keep busy, by its affinity and within its quota.
        quota_cores: the cores that its quota of time is worth; None where it has none.
        throttled: whether that quota has held the process up lately.
        waiting: the part of the last ten seconds in which some thread of the machine waited for a core; None where the
            system does not say.
        num_running: the threads of the machine that run or wait for a core at this moment; 0 where it does not say.
        num_cores: the cores of the machine.
    """

    num_threads: int
    usable_cores: int
    quota_cores: float | None = None
    throttled: bool = False
    waiting: float | None = None
    num_running: int = 0
    num_cores: int = 1


def read_core_share(
    num_threads: int, *, num_allowed: int, num_cores: int, read: ReadText, throttled: bool = False
) -> CoreShare:
    """Returns what a team of this process has, by the files of the system.

    Args:
        num_allowed: the CPUs that this process may run on, by its affinity.
        num_cores: the CPUs of the machine.
        throttled: whether its quota has held it up lately.
    """
    return CoreShare(
        num_threads=num_threads,
        usable_cores=usable_cores(num_allowed, read),
        quota_cores=quota_cores(read),
        throttled=throttled,
        waiting=_waiting(read("/proc/pressure/cpu") or ""),
        num_running=_num_running(read("/proc/loadavg") or ""),
        num_cores=num_cores,
    )


def why_short(share: CoreShare) -> str:
    """Says why a team has too few cores for as long as it lives; nothing where it has enough."""
    if share.num_threads > share.usable_cores:
        return f"{share.num_threads} threads have {share.usable_cores} cores"
    if share.quota_cores is not None and share.quota_cores % 1:
        return f"the container's CPU quota of {share.quota_cores:g} cores is no whole number"
    return ""


def why_shared(share: CoreShare) -> str:
    """Says why threads should not spin for long now; nothing where the team has its cores for itself."""
    if short := why_short(share):
        return short
    if share.throttled:
        return "the container's CPU quota holds the process up"
    if share.waiting is not None:
        words = f"some thread waited for a core in {share.waiting:.0%} of the last ten seconds"
        return words if share.waiting >= MOST_WAITING else ""
    if share.num_running > share.num_cores:
        return f"{share.num_running} threads run on the machine's {share.num_cores} cores"
    return ""


def barrier_spins(share: CoreShare) -> int:
    """Returns how often a thread spins at a barrier of its team before it lets others have its core."""
    return FEW_SPINS if why_shared(share) else MANY_SPINS


def openmp_waits(share: CoreShare, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables by which a process that starts has the threads of OpenMP wait; none where some are set.

    They are those of GCC's runtime, which torch has on Linux, and of LLVM's. Their threads wait between operations. A
    process keeps them, so what goes on while it starts, such as the start of others, does not count.
    """
    if any(name in environ for name in _OPENMP_VARIABLES):
        return {}
    if why_short(share):
        return {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    return {"GOMP_SPINCOUNT": _OPENMP_SPINS}


def _waiting(pressure: str) -> float | None:
    """Reads the share of time in which some thread waited, of the last ten seconds, from ``/proc/pressure/cpu``."""
    for line in pressure.splitlines():
        kind, *pairs = line.split() or [""]
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if kind == "some" and "avg10" in values:
            return float(values["avg10"]) / 100
    return None


def _num_running(load: str) -> int:
    """Reads the number of threads that run or wait for a core from ``/proc/loadavg``; 0 where it has none."""
    words = load.split()
    running = words[3].partition("/")[0] if len(words) > 3 else ""
    return int(running) if running.isdecimal() else 0
