"""Joins a Ray cluster that was there before, within a deadline, for a caller who may give up at any time.

``ray.init`` tries for minutes where nothing answers, and no signal ends it. So a connection is tried first, and
``ray.init`` runs on a thread that is left behind where it does not return.
"""

import logging
import re
import socket
import threading
import time

import ray
from ray._private.services import get_ray_address_from_environment

from orchestrator.errors import LaunchFailed
from placement.errors import InvalidConfig, cause_of

JOIN_S = 15.0
"""How long the head of a cluster may take to answer, and after that Ray to join it."""

STOPPED = "stopped while the Ray cluster was joined"

_POLL_S = 0.1
_CONNECT_S = 0.5
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:/]+):[0-9]{1,5}")
_FIX = (
    "Start one with `ray start --head`, name its address, or write `local`. Where it asks for a token, set "
    "RAY_AUTH_MODE=token here too, and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds it."
)


def join(address: str, stop: threading.Event) -> None:
    """Joins the cluster at ``address``, which may be ``auto``.

    Raises:
        InvalidConfig: no cluster answers there in time, or it does not take this process in.
        LaunchFailed: ``stop`` was set before the end.
    """
    head = address if address != "auto" else _running(address)
    _wait_until_it_listens(address, head, stop)
    _init(address, head, stop)


def _running(address: str) -> str:
    """Returns what ``auto`` stands for: RAY_ADDRESS, or the last cluster that was started on this machine."""
    try:
        found = str(get_ray_address_from_environment(address, None))
    except ConnectionError as error:
        raise not_joined(address, str(error)) from None
    if not _ADDRESS.fullmatch(found):
        raise not_joined(address, f"RAY_ADDRESS is {found!r}, which is not host:port")
    return found


def not_joined(address: str, reason: str) -> InvalidConfig:
    """Makes the error for a cluster that could not be joined, or not be started."""
    problem = f"no Ray cluster could be joined or started ({' '.join(reason.split())})"
    return InvalidConfig(field="cluster.ray_address", value=address, problem=problem, fix=_FIX)


def _wait_until_it_listens(address: str, head: str, stop: threading.Event) -> None:
    """Waits until something takes connections at the address of the head; Ray finds out what it is."""
    host, _, port = head.rpartition(":")
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
            return
        except OSError as error:
            reason = error.strerror or "no answer"
        if stop.wait(_POLL_S):
            raise LaunchFailed(STOPPED)
        if time.monotonic() > deadline:
            found = "" if address == head else f" at {head}"
            raise not_joined(address, f"no Ray head answers{found} within {JOIN_S:g} s: {reason.lower()}")


def _init(address: str, head: str, stop: threading.Event) -> None:
    failures: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            # Its warnings are that it runs on a thread of its own, and that there is a token.
            ray.init(address=head, logging_level=logging.ERROR)
        except BaseException as error:  # it is raised below, on the thread that waits
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="join-ray", daemon=True).start()
    if not _wait(done, stop, JOIN_S):
        problem = f"something listens at {head}, and joining it did not end within {JOIN_S:g} s"
        raise not_joined(address, f"{problem}: is it a Ray head, and is Ray started on this machine?")
    for error in failures:
        if isinstance(error, ConnectionError | ValueError | RuntimeError | ray.exceptions.AuthenticationError):
            raise not_joined(address, str(error)) from error
        raise not_joined(address, cause_of(error)) from error


def _wait(event: threading.Event, stop: threading.Event, timeout_s: float) -> bool:
    """Waits until ``event`` is set; returns whether it was in time. Raises LaunchFailed where ``stop`` came first."""
    deadline = time.monotonic() + timeout_s
    while not event.wait(_POLL_S):
        if stop.is_set():
            raise LaunchFailed(STOPPED)
        if time.monotonic() > deadline:
            return False
    return True
