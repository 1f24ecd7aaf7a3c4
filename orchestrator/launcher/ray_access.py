"""Owns who gets into a Ray, and where this node is in it.

A Ray that is started here answers on loopback to its own processes alone; one that is joined is asked whether it lets
in anybody.
"""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from placement.errors import cause_of

# A call that changes nothing; where Ray asks for a token, it does so for every call.
_HARMLESS_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_ANSWER_TIMEOUT_S = 5.0
# Ray's control store is reached directly, whatever proxy the environment names.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


def start_own_ray(*, num_cpus: int) -> None:
    """Starts Ray on loopback with a random token, which its processes inherit."""
    # Whatever token the user has is that of another cluster, and others may know it.
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    # Ray read the environment when it was imported, and keeps the token of a Ray that was here before.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    with _on_loopback():
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Lets a Ray that starts within it take loopback for this node's address, where all of its servers then listen.

    An address that ``ray.init`` is given will not do: for 127.0.0.1 it puts that of another interface. The environment
    variable RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 would, but it counts for a Ray that is joined as well, and only where
    it was set before Ray was imported.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def node_ip() -> str:
    """Returns the address that Ray knows this node by."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def lets_in_anybody() -> bool:
    """Whether the Ray that this process is connected to runs the code of whoever reaches it."""
    return answers_without_token(ray.get_runtime_context().gcs_address)


def answers_without_token(gcs_address: str) -> bool:
    """Whether Ray's control store there answers a caller that shows no token; one that cannot be asked does not."""
    with grpc.insecure_channel(gcs_address, options=_CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary(_HARMLESS_CALL, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=_ANSWER_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return True


def ray_cause(error: ray.exceptions.RayError) -> str:
    """Returns what went wrong in one line, as Ray's own texts are tracebacks and lists."""
    return cause_of(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error)
