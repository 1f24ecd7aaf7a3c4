"""Who can reach what serves: the sockets that processes listen on, and code that somebody else hands to a Ray."""

import ipaddress
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from tests.support.clocks import PATIENCE_S
from tests.support.deploying.service import Command

_CODE = """
import sys
import ray

@ray.remote(num_cpus=0)
def answer():
    return 6 * 7

ray.init(address=sys.argv[1], log_to_driver=False)
print(f"answer={ray.get(answer.remote(), timeout=60.0)}")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A TCP socket that a process listens on; ``host`` as ss writes it."""

    process: str
    pid: int
    host: str
    port: int

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "*":
            return False
        address = ipaddress.ip_address(self.host.strip("[]").partition("%")[0])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback


def missing_ss() -> str | None:
    """Why sockets cannot be listed here; None where they can."""
    return None if shutil.which("ss") else "ss, of iproute2, is not installed"


def listeners(pids: Iterable[int]) -> list[Listener]:
    """What the processes listen on, by ``ss -ltnp``."""
    wanted = set(pids)
    said = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    found = []
    for line in said.splitlines():
        host, _, port = line.split()[3].rpartition(":")
        for name, pid in re.findall(r'\("([^"]*)",pid=(\d+)', line):
            if int(pid) in wanted:
                found.append(Listener(process=name, pid=int(pid), host=host, port=int(port)))
    return found


def code_in_ray(address: str, *, token: str | None) -> Command:
    """A process that joins the Ray at ``address`` and has it compute ``answer=42``."""
    shown = {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    # Ray would look for 127.0.0.1 at another interface; and tries 20 times, a second each.
    env = shown | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_NUM_REDIS_GET_RETRIES": "2"}
    return Command([sys.executable, "-c", _CODE, address], env=env)
