"""A Ray cluster whose nodes are the hosts of an emulated one."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.netlab.lab import Host
from tests.support.deploying.service import Command

LABEL = "host"
"""The Ray node label that says which host a node is."""

_BIN = Path(sys.executable).parent
ENV = {
    "PATH": f"{_BIN}:{os.environ['PATH']}",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}
"""What commands that join the cluster run with."""

_PORT = 6379
_START_S = 120.0
_OBJECT_STORE_BYTES = 100_000_000


@contextmanager
def ray_nodes(head: Host, *others: Host, num_cpus: int = 1) -> Iterator[str]:
    """Ray on every host; yields the cluster's address. Its processes are ended by pid."""
    address = f"{head.address}:{_PORT}"
    # A short name: Ray's sockets lie there, whose paths may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as directory, ExitStack() as stack:
        for hosts in ((head,), others):  # the others together, once there is a head to join
            nodes = []
            for host in hosts:
                role = ["--head", f"--port={_PORT}"] if host is head else [f"--address={address}"]
                command = [
                    str(_BIN / "ray"), "start", *role, "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}",
                    f"--node-ip-address={host.address}", f"--temp-dir={directory}/{host.spec.name}",
                    f"--labels={LABEL}={host.spec.name}", f"--object-store-memory={_OBJECT_STORE_BYTES}",
                ]  # fmt: skip
                nodes.append(stack.enter_context(Command(host.command(command), env=ENV)))
                stack.callback(host.end)  # those that are no longer its descendants
            for node in nodes:
                node.wait_for("Ray runtime started", _START_S)
        yield address
