"""What an emulated cluster is made of: network namespaces by ``ip``, and groups of cgroup v1 that limit CPU time."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PREFIX = "netlab"
NAMESPACES = Path("/run/netns")

_COMMAND_S = 20.0
_END_S = 10.0
_POLL_S = 0.02
# Short beside what is measured, so that a slow host is slow and not fast by turns.
_PERIOD_US = 20_000
_LEFT = re.compile(rf"{PREFIX}-([0-9]+)-[0-9]+-.+")


def ip(*args: str, lines: Sequence[str] = ()) -> str:
    """``ip ARGS``, with lines for its standard input; returns its output. Raises CalledProcessError."""
    argv, text = ["ip", *args], "".join(f"{line}\n" for line in lines)
    return subprocess.run(argv, input=text, check=True, capture_output=True, text=True, timeout=_COMMAND_S).stdout


def add_namespace(name: str) -> None:
    """A network of its own, with nothing but loopback."""
    ip("netns", "add", name)
    ip("-n", name, "link", "set", "lo", "up")


def delete_namespace(name: str) -> None:
    """After :func:`end_processes`, else the processes keep it."""
    ip("netns", "delete", name)


def end_processes(namespace: str) -> None:
    """Kills whoever lives in a network namespace, whatever its process group; returns when nobody does."""
    deadline_s = time.monotonic() + _END_S
    while pids := [int(text) for text in ip("netns", "pids", namespace).split()]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline_s, f"{pids} in {namespace} do not end"
        time.sleep(_POLL_S)


def cpu_groups() -> Path | None:
    """Where cgroup v1 limits CPU time; None where it does not."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(where)
    return None


def add_cpu_group(name: str, share: float) -> Path:
    """Whoever joins it gets this much of a core's time together with the others there."""
    groups = cpu_groups()
    assert groups is not None, "requirements come first"
    group = groups / name
    group.mkdir()
    (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
    set_cpu_share(group, share)
    return group


def set_cpu_share(group: Path, share: float) -> None:
    """The members of a group get this much of a core's time together from now on."""
    (group / "cpu.cfs_quota_us").write_text(str(round(share * _PERIOD_US)))


def delete_cpu_group(group: Path) -> None:
    """After the end of its processes, which the kernel takes a moment to let go."""
    deadline_s = time.monotonic() + _END_S
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() >= deadline_s:
                raise
            time.sleep(_POLL_S)
        else:
            return


def sweep() -> None:
    """Removes what is left of labs whose process was killed before it could."""
    for name in _left_in(NAMESPACES):
        with contextlib.suppress(subprocess.CalledProcessError):  # somebody else did
            end_processes(name)
            delete_namespace(name)
    groups = cpu_groups()
    for name in _left_in(groups) if groups is not None else ():
        with contextlib.suppress(FileNotFoundError):
            assert groups is not None
            delete_cpu_group(groups / name)


def _left_in(directory: Path) -> list[str]:
    if not directory.is_dir():
        return []
    found = ((path.name, _LEFT.fullmatch(path.name)) for path in directory.iterdir())
    return [name for name, match in found if match is not None and not Path("/proc", match[1]).exists()]
