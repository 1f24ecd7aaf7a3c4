"""Owns what a process and the child that it starts agree on: the line in which the child says where it listens, the
exit code by which it says that it is not to blame, and that it never outlives its parent.

The line is JSON on standard output. Libraries may print there too, before it and after it, so the parent goes on
reading until the child ends: a pipe that nobody reads would stop the child once it is full.
"""

import ctypes
import json
import os
import signal
import sys
from dataclasses import dataclass

PEER_LOST_EXIT_CODE = 3
"""Exit code of a worker that ended because another rank of its replica was lost, whose own end says more."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """A child process that listens.

    Attributes:
        address: ``host:port``, as the child was told to bind.
        ranks_port: where the other ranks of a worker's replica connect; 0 of a gateway.
        target: what the code of a worker is generated for, such as ``avx2``; empty of a gateway.
        http_address: where a gateway listens for HTTP; empty where it does not.
    """

    address: str
    pid: int
    ranks_port: int = 0
    target: str = ""
    http_address: str = ""

    def line(self) -> str:
        """Returns the line that the child prints, without its end."""
        said = {"address": self.address, "ranks_port": self.ranks_port, "pid": self.pid, "target": self.target}
        http = {"http_address": self.http_address} if self.http_address else {}
        return json.dumps({"event": "listening", **said, **http})

    @classmethod
    def read(cls, line: str) -> "Listening | None":
        """Returns what a line of a child's standard output says; None where the line says something else."""
        try:
            said = json.loads(line)
            if said["event"] != "listening":
                return None
            return cls(
                address=str(said["address"]),
                ranks_port=int(said["ranks_port"]),
                pid=int(said["pid"]),
                target=str(said["target"]),
                http_address=str(said.get("http_address", "")),
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            return None


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when its parent ends (Linux), and ends it now if the parent is gone already.

    The kernel watches the thread that started the process, not the whole parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the parent process is gone")
