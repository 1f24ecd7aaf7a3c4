"""Replicas whose keys and values attention workers hold, as they are served: real processes, real connections."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from orchestrator.cli.render import status_lines
from orchestrator.cli.status_document import status_document
from orchestrator.controller.state import Phase
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.deployment import Deployment, deploy, make_config, settled
from tests.support.gateway.answers import answer, request, tokens

PROMPTS = ("a", "once upon a time", "x y z " * 30)


def sections(num_model: int, num_attention: int, **attention: object) -> dict[str, dict[str, Any]]:
    """Sections of a configuration with so many workers for the model, as one replica each, and for attention."""
    return {
        "cluster": {
            "workers": [
                {"name": "model", "device": "cpu", "threads": 1, "count": num_model},
                {"name": "memory", "device": "cpu", "threads": 1, "count": num_attention},
            ]
        },
        "serving": {
            "attention": {"workers": ["memory"], "offload": "always", "kv_cache": "8MiB"} | attention,
        },
    }


async def answers(running: Deployment) -> list[list[int]]:
    asked = [request(prompt=prompt, max_tokens=30) for prompt in PROMPTS]
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        found = await asyncio.gather(*(answer(stub, message) for message in asked))
    return [tokens(responses) for responses in found]


async def status(running: Deployment) -> admin_pb2.GetStatusResponse:
    async with grpc.aio.insecure_channel(running.address) as channel:
        return await admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest())


@pytest.mark.parametrize(
    "attention",
    [{"partition": "kv_heads"}, {"partition": "token_ranges"}, {"local_kv_cache": "64KiB", "partition": "requests"}],
    ids=["heads", "tokens", "mixed residency by requests"],
)
async def test_answers_are_those_of_a_replica_that_holds_everything(
    served_checkpoint: Path, tmp_path: Path, attention: dict[str, object]
) -> None:
    plain, offloaded = tmp_path / "plain", tmp_path / "offloaded"
    plain.mkdir()
    offloaded.mkdir()
    async with deploy(make_config(plain, served_checkpoint)) as running:
        expected = await answers(running)
    async with deploy(make_config(offloaded, served_checkpoint, **sections(1, 2, **attention))) as running:
        assert await answers(running) == expected
        found = await status(running)
        await settled(running, timeout_s=PATIENCE_S)
    assert [rank.worker for rank in found.attention.ranks] == ["memory-0", "memory-1"]
    assert all("replica-0" in rank.holds for rank in found.attention.ranks)
    lines = [line for line in status_lines(found) if line.startswith("event=attention ")]
    assert len(lines) == 2 and "state=ready" in lines[0] and "worker=memory-0" in lines[0]
    assert [rank["worker"] for rank in status_document(found)["attention"]["ranks"]] == ["memory-0", "memory-1"]


async def test_replicas_share_attention_workers(served_checkpoint: Path, tmp_path: Path) -> None:
    async with deploy(make_config(tmp_path, served_checkpoint, **sections(2, 1))) as running:
        found = await answers(running)
        assert all(found)
        group = running.shell.state.attention
        assert group is not None and group.phase is Phase.READY
        (rank,) = (await status(running)).attention.ranks
        assert "replica-0" in rank.holds and "replica-1" in rank.holds


async def test_attention_workers_that_would_not_pay_are_stopped_once_measured_and_status_says_why(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    refused = sections(1, 1, offload="auto", link_speed=1000)
    async with deploy(make_config(tmp_path, served_checkpoint, **refused)) as running:
        assert await answers(running)
        measured = running.launcher.workers["attention", 0]
        assert not psutil.pid_exists(measured.pid) and running.shell.state.attention is None
        found = await status(running)
    assert not found.HasField("attention")
    assert "attention is not offloaded" in found.offloading.lower() and "Idle: memory." in found.offloading
    assert "attention" not in status_document(found) and "memory" in status_document(found)["offloading"]


@pytest.mark.parametrize(
    "stages",
    [
        [{"workers": ["model-0", "model-1"], "tensor_split": [1, 1]}],
        [{"workers": ["model-0"]}, {"workers": ["model-1"], "layers": 1}],
    ],
    ids=["tensor", "stages"],
)
async def test_replicas_of_two_ranks_have_sessions_of_their_own(
    served_checkpoint: Path, tmp_path: Path, stages: list[dict[str, Any]]
) -> None:
    plain, offloaded = tmp_path / "plain", tmp_path / "offloaded"
    plain.mkdir()
    offloaded.mkdir()
    async with deploy(make_config(plain, served_checkpoint)) as running:
        expected = await answers(running)
    asked = sections(2, 1)
    asked["serving"]["parallelism"] = {"replicas": [{"stages": stages}]}
    async with deploy(make_config(offloaded, served_checkpoint, **asked)) as running:
        assert await answers(running) == expected
        await settled(running, timeout_s=PATIENCE_S)
