"""Whether this machine can emulate a cluster."""

import os
import shutil
import subprocess
from functools import cache

import pytest

from tests.netlab.system import cpu_groups

_TRY_S = 10.0


@cache
def missing(*, cpu_shares: bool = False) -> str | None:
    """Why it cannot, in one line; None where it can.

    Args:
        cpu_shares: whether hosts shall have a share of the CPU's time.
    """
    if os.name != "posix" or os.geteuid() != 0:
        return "an emulated cluster needs root"
    for tool in ("ip", "nsenter", "unshare", "taskset"):
        if shutil.which(tool) is None:
            return f"an emulated cluster needs the command {tool}"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"an emulated cluster needs /dev/net/tun ({error.strerror})"
    if cpu_shares and ((groups := cpu_groups()) is None or not os.access(groups, os.W_OK)):
        return "a share of the CPU needs cgroup v1's cpu controller"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "ip", "tuntap", "add", "dev", "net0", "mode", "tun"],
        capture_output=True,
        text=True,
        timeout=_TRY_S,
        check=False,
    )
    if tried.returncode:
        return f"an emulated cluster needs network namespaces and TUN devices ({tried.stderr.strip()})"
    return None


def skip_unless_possible(*, cpu_shares: bool = False) -> None:
    """Skips the test that asks, where :func:`missing` finds something."""
    reason = missing(cpu_shares=cpu_shares)
    if reason is not None:
        pytest.skip(reason)
