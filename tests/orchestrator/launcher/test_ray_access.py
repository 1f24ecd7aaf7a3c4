"""Who gets into a Ray, as far as it can be told without one."""

import os
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import ray

from orchestrator.launcher.cluster import connect
from orchestrator.launcher.process import environment
from orchestrator.launcher.ray_access import answers_without_token
from placement.errors import InvalidConfig
from tests.support.deploying.service import free_port


class ControlStore(grpc.GenericRpcHandler):
    """Answers any call, or says what Ray says to who has no token."""

    def __init__(self, *, asks_for_token: bool) -> None:
        self._asks_for_token = asks_for_token

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        if self._asks_for_token:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: missing or incorrect")
        return b""


@contextmanager
def control_store(*, asks_for_token: bool) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[ControlStore(asks_for_token=asks_for_token)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("asks_for_token", [True, False])
def test_a_ray_that_answers_without_a_token_lets_in_anybody(
    asks_for_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with control_store(asks_for_token=asks_for_token) as address:
        assert answers_without_token(address) is not asks_for_token


def test_what_cannot_be_asked_is_not_said_to_let_in_anybody() -> None:
    assert not answers_without_token(f"127.0.0.1:{free_port()}")


def test_a_joined_ray_keeps_its_settings_and_a_missing_token_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)

    def init(*, address: str, **_: object) -> None:
        raise ray.exceptions.AuthenticationError(f"no token for {address}")

    monkeypatch.setattr(ray, "init", init)
    words = r"no token for 127.0.0.1:\d+.* set RAY_AUTH_MODE=token .*RAY_AUTH_TOKEN"
    with control_store(asks_for_token=True) as address, pytest.raises(InvalidConfig, match=words):
        connect(address, num_cpus=1, stop=threading.Event())
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(os.environ)


def test_rays_token_goes_to_no_process_that_does_not_connect_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secret")
    assert not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(environment())
    assert environment(ray_token=True)["RAY_AUTH_TOKEN"] == "secret"
