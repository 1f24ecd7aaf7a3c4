"""Replicas with roles as they are served: real processes, and what the status says of each."""

from pathlib import Path

import grpc

from orchestrator.cli.status_document import status_document
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
