"""Joins a Ray cluster that was there before, within a deadline, for a caller who may give up at any time.

``ray.init`` tries for minutes where nothing answers, and no signal ends it. So the cluster's control store is asked
first, and ``ray.init`` runs on a thread that is left behind where it does not return.
"""

import logging
import threading
import time

import grpc
import ray
from ray._private.services import get_ray_address_from_environment

from orchestrator.errors import LaunchFailed
from placement.errors import InvalidConfig, cause_of

JOIN_S = 15.0
"""How long the head of a cluster may take to answer, and after that Ray to join it."""

_POLL_S = 0.1
# Ray's control store is reached directly, whatever proxy the environment names.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)
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
    _wait_until_it_answers(address, head, stop)
    _init(address, head, stop)


def _running(address: str) -> str:
    """Returns what ``auto`` stands for: RAY_ADDRESS, or the last cluster that was started on this machine."""
    try:
        return str(get_ray_address_from_environment(address, None))
    except ConnectionError as error:
        raise not_joined(address, str(error)) from None


def not_joined(address: str, reason: str) -> InvalidConfig:
    """Makes the error for a cluster that could not be joined, or not be started."""
    problem = f"no Ray cluster could be joined or started ({' '.join(reason.split())})"
    return InvalidConfig(field="cluster.ray_address", value=address, problem=problem, fix=_FIX)


def _wait_until_it_answers(address: str, head: str, stop: threading.Event) -> None:
    with grpc.insecure_channel(head, options=_CHANNEL_OPTIONS) as channel:
        ready = grpc.channel_ready_future(channel)
        answered = threading.Event()
        ready.add_done_callback(lambda _: answered.set())
        try:
            if not _wait(answered, stop, JOIN_S):
                found = "" if address == head else f" at {head}"
                raise not_joined(address, f"nothing that is a Ray head answers{found} within {JOIN_S:g} s")
        finally:
            ready.cancel()


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
        reason = f"its head answers, and joining it did not end within {JOIN_S:g} s: is Ray started on this machine?"
        raise not_joined(address, reason)
    for error in failures:
        if isinstance(error, ConnectionError | ValueError | RuntimeError | ray.exceptions.AuthenticationError):
            raise not_joined(address, str(error)) from error
        raise not_joined(address, cause_of(error)) from error


def _wait(event: threading.Event, stop: threading.Event, timeout_s: float) -> bool:
    """Waits until ``event`` is set; returns whether it was in time. Raises LaunchFailed where ``stop`` came first."""
    deadline = time.monotonic() + timeout_s
    while not event.wait(_POLL_S):
        if stop.is_set():
            raise LaunchFailed("stopped while the Ray cluster was joined")
        if time.monotonic() > deadline:
            return False
    return True
