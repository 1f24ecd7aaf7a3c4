"""One deployment of real worker processes for all tests of a module, which share its event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from protos.heterodyne.v1 import inference_pb2_grpc
from tests.support.clocks import PATIENCE_S, LoopClock
from tests.support.deploying.deployment import (
    Deployment,
    deploy,
    make_config,
    settled,
    shared_sequences,
    two_ranks,
    two_stages,
)
from tests.support.tokenizer import save_tokenizer


@pytest_asyncio.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    """The clock of the test's event loop."""
    clock = LoopClock()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", clock)
    return clock


@pytest.fixture(scope="session")
def slow_checkpoint(llama_checkpoint: Callable[..., Path]) -> Path:
    """One whose answers take seconds, so that what happens in the midst of them does, on a busy machine too."""
    directory = llama_checkpoint(seed=11, num_hidden_layers=32)
    save_tokenizer(directory)
    return directory


SECTIONS: dict[str, dict[str, dict[str, object]]] = {
    "one rank": {},
    "two ranks": two_ranks(),
    "shared sequences": shared_sequences(),
    "two stages": two_stages(),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=SECTIONS)
async def shared(
    request: pytest.FixtureRequest, served_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Deployment]:
    """One replica: of one rank, or of two that share every layer, or every sequence, or the layers."""
    sections = SECTIONS[request.param]
    async with deploy(make_config(tmp_path_factory.mktemp("shared"), served_checkpoint, **sections)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def deployment(shared: Deployment) -> AsyncIterator[Deployment]:
    """The shared deployment; the test must leave nothing in it."""
    yield shared
    await settled(shared, timeout_s=PATIENCE_S)
    assert len(shared.gateway.generator.journal) == 0


@pytest_asyncio.fixture(loop_scope="module")
async def stub(deployment: Deployment) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(deployment.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
