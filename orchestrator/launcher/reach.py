"""Checks that a worker can be connected to from here. No Ray here.

A worker that has said where it listens takes connections at once, however busy it is, as the kernel takes them for it.
Who gets none is kept out by the network.
"""

import asyncio
import socket

from orchestrator.launcher.process import WorkerFailed

REACH_S = 6.0


async def check_reached(address: str, *, node: str, timeout_s: float = REACH_S) -> None:
    """Opens a connection to ``address``, which a worker on ``node`` listens at, and closes it.

    Raises:
        WorkerFailed: it does not come about within ``timeout_s``. The text says what to do.
    """
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), timeout_s)
    except OSError as error:  # among them TimeoutError
        reason = error.strerror or f"no answer within {timeout_s:g} s"
        raise WorkerFailed(
            f"{socket.gethostname()} cannot connect to it at {address} ({reason}). Let all TCP ports pass between the "
            f"machines (a firewall on {node}?), or set cluster.bind_host to an address that the others reach"
        ) from None
    writer.close()
