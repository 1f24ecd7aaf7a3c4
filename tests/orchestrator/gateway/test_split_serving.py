"""Prompts computed by one pool and answered by another, as clients see it: real processes and the public service."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.deployment import Deployment, deploy, make_config, settled
from tests.support.gateway.answers import answer, check_order, request, tokens

LONG = "once upon a time there was " * 8
WORKERS = [{"name": name, "device": "cpu", "threads": 1} for name in ("a", "b", "c", "d")]
POOLS: dict[str, dict[str, Any]] = {
    "a tensor split sends to stages": {
        "cluster": {"workers": WORKERS},
        "serving": {
            "disaggregation": "always",
            "block_size": 8,
            "pools": {"prefill": {"workers": ["a", "b"]}, "decode": {"workers": ["c", "d"], "block_size": 16}},
            "parallelism": {
                "replicas": [
                    {"stages": [{"workers": ["a", "b"], "tensor_split": [3, 1]}]},
                    {"stages": [{"workers": ["c"]}, {"workers": ["d"]}]},
                ]
            },
        },
    },
    "two compute prompts for one that shares sequences": {
        "cluster": {"workers": WORKERS},
        "serving": {
            "disaggregation": "always",
            "block_size": 8,
            "parallelism": {
                "replicas": [
                    {"role": "prefill", "stages": [{"workers": ["a"]}]},
                    {"role": "prefill", "stages": [{"workers": ["b"]}]},
                    {"role": "decode", "stages": [{"workers": ["c", "d"], "sequence_split": [1, 3]}]},
                ]
            },
        },
    },
}


def asked() -> list[pb.GenerateRequest]:
    """A short prompt, long ones that begin alike, several choices, draws with a seed, a grammar, scores of a prompt."""
    return [
        request(prompt="a", max_tokens=20),
        request(prompt=LONG, max_tokens=20),
        request(
            prompt=LONG + "a king",
            max_tokens=20,
            num_choices=3,
            sampling=pb.SamplingParams(temperature=0.8, seed=5),
        ),
        request(
            prompt="x y z " * 30,
            max_tokens=30,
            structured_output=pb.StructuredOutput(regex="(yes|no), (yes|no)!"),
            ignore_eos=False,
        ),
        request(prompt=LONG, max_tokens=4, echo=True, logprobs=2),
    ]


async def answers(running: Deployment) -> list[list[pb.GenerateResponse]]:
    """What the service answers, one after the other and then all at once."""
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        found = [await answer(stub, message) for message in asked()]
        found += await asyncio.gather(*(answer(stub, message) for message in asked()))
    for responses in found:
        check_order(responses)
    await settled(running, timeout_s=PATIENCE_S)
    return found


def told(responses: list[pb.GenerateResponse]) -> tuple[object, ...]:
    """What must be the same, whoever computes it."""
    scores = [token.logprob for response in responses for token in response.echo.tokens]
    chosen = [tokens([each for each in responses if each.chunk.choice == choice]) for choice in range(3)]
    return chosen, [pytest.approx(score, abs=1e-4) for score in scores]


@pytest.mark.parametrize("name", POOLS)
async def test_a_split_service_answers_as_one_replica_does(served_checkpoint: Path, tmp_path: Path, name: str) -> None:
    for directory in ("whole", "split"):
        (tmp_path / directory).mkdir()
    async with deploy(make_config(tmp_path / "whole", served_checkpoint)) as running:
        expected = await answers(running)
    async with deploy(make_config(tmp_path / "split", served_checkpoint, **POOLS[name])) as running:
        found = await answers(running)
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)
            status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=PATIENCE_S)
    for one, other in zip(found, expected, strict=True):
        assert told(one) == told(other)
    long = found[1][-1].finished
    assert long.prefill_replica.startswith("replica-") and long.prefill_replica != long.replica
    assert long.transfer.num_tokens == long.usage.prompt_tokens - 1 and long.transfer.num_bytes > 0
    assert not found[0][-1].finished.HasField("prefill_replica"), "less than a block is sooner computed than sent"
    assert not found[4][-1].finished.HasField("prefill_replica"), "a prompt whose tokens are scored is computed once"
    decode = next(each for each in status.replicas if each.role == "decode")
    assert decode.load.kv_transfers > 0 and not decode.load.kv_failures
