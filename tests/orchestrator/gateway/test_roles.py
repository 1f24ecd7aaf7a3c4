"""Replicas with roles as they are served: real processes, and what the status says of each."""

from pathlib import Path
from typing import Any

import grpc
import pytest

from orchestrator.cli.status_document import status_document
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.server import Gateway, GatewaySettings
from placement.model.specs import DType
from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.deployment import deploy, make_config

POOLS = {
    "prefill": {"workers": ["prompts"], "dtype": "bfloat16", "block_size": 32},
    "decode": {"workers": ["answers"]},
}


async def test_the_status_has_the_role_the_number_type_and_the_block_size_of_each_replica(
    served_checkpoint: Path, tmp_path: Path
) -> None:
    config = make_config(
        tmp_path,
        served_checkpoint,
        model={"dtype": "float32"},
        cluster={"workers": [{"name": name, "device": "cpu", "threads": 1} for name in ("prompts", "answers")]},
        serving={"pools": POOLS},
    )
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        status = await admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=PATIENCE_S)
        assert [(each.role, each.dtype, each.block_size) for each in status.replicas] == [
            ("prefill", "bfloat16", 32),
            ("decode", "float32", 16),
        ]
        assert status.dtype == "float32"
        assert [each["role"] for each in status_document(status)["replicas"]] == ["prefill", "decode"]
        # Blocks of twice the tokens, which take half the bytes each: each replica has as many, for its own memory.
        loads = [each.load.total_blocks for each in status.replicas]
        assert loads[0] == loads[1] > 0


async def test_a_transfer_is_reckoned_with_as_it_is_written_before_any_was_seen(
    served_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def kept(*, kv_bytes_per_token: int, **others: Any) -> Fleet:
        given.append(kv_bytes_per_token)
        return Fleet(kv_bytes_per_token=kv_bytes_per_token, **others)

    monkeypatch.setattr("orchestrator.gateway.server.Fleet", kept)
    for kv_transfer in ("model", "int8"):
        config = make_config(tmp_path, served_checkpoint, serving={"kv_transfer": kv_transfer, "block_size": 64})
        nobody = "127.0.0.1:1"
        gateway = Gateway(
            GatewaySettings(config=config, control_address=nobody, max_context_tokens=256, dtype=DType.BFLOAT16)
        )
        await gateway.start()
        await gateway.drain()
    native, rounded = given
    assert native / 2 < rounded < 0.51 * native, "half, and the scales"
