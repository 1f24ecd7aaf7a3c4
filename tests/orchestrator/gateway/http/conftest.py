"""A deployment of a real worker process whose model has a chat template that takes tools, and a client of its API."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest_asyncio

from protos.heterodyne.v1 import inference_pb2_grpc
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.deployment import Deployment, deploy, make_config, settled
from tests.support.gateway.tool_templates import HERMES


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chatting(served_checkpoint: Path, tmp_path_factory: Any) -> AsyncIterator[Deployment]:
    """One replica of a model that chats."""
    directory = tmp_path_factory.mktemp("chatting") / "talker"
    shutil.copytree(served_checkpoint, directory)
    (directory / "chat_template.jinja").write_text(HERMES)
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|e|>"}, "bos_token": "<|b|>"}')
    async with deploy(make_config(tmp_path_factory.mktemp("config"), directory)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def deployment(chatting: Deployment) -> AsyncIterator[Deployment]:
    """The shared deployment; the test must leave nothing in it."""
    yield chatting
    await settled(chatting, timeout_s=PATIENCE_S)
    assert len(chatting.gateway.generator.journal) == 0


@pytest_asyncio.fixture(loop_scope="module")
async def stub(deployment: Deployment) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(deployment.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


@pytest_asyncio.fixture(loop_scope="module")
async def client(deployment: Deployment) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://{deployment.gateway.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        yield client
