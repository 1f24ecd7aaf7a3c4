"""A model that no worker has memory for, through real Ray: cut by what was measured, and served."""

import os
import re
import shlex

import grpc
import pytest

from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.service import serve

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

# The demo model takes 412 MiB of a worker, 384 of them the process; its context takes all of the KV cache.
WORKERS = ", ".join(
    f"{{name: {name}, device: cpu, threads: {threads}, memory: 411MiB}}"
    for name, threads in (("one", min(2, os.cpu_count() or 1)), ("two", 1))
)
SETTINGS = (
    f"cluster.workers=[{WORKERS}]",
    "model.max_context_tokens=1024",
    "serving.kv_cache=4MiB",
    "serving.token_budget=64",
    "serving.max_num_seqs=4",
)
FFN_COLUMNS = 704


def test_a_model_too_large_for_each_worker_is_cut_by_measured_speed_and_answers() -> None:
    command, address = serve(*SETTINGS)
    with command:
        said = [dict(word.split("=", 1) for word in shlex.split(line)) for line in lines(command.output())]
        with grpc.insecure_channel(address) as channel:
            call = inference_pb2_grpc.InferenceStub(channel).Generate(
                pb.GenerateRequest(prompt="In the beginning", max_tokens=8, ignore_eos=True), timeout=PATIENCE_S
            )
            *_, last = call
            status = admin_pb2_grpc.AdminStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=PATIENCE_S)
        command.stop_cleanly()
    assert last.finished.usage.completion_tokens == 8
    (split,) = [line for line in said if line["event"] == "auto_split"]
    assert split["by"] == "speed"
    rates = {name: float(rate) for name, rate in (each.split() for each in split["weights_gb_per_s"].split(", "))}
    assert list(rates) == ["one", "two"] and min(rates.values()) > 0.05
    (replica,) = status.replicas
    assert (replica.budget.token_budget, replica.budget.is_auto) == (64, False) and replica.budget.expected_s > 0
    for name, rank in zip(rates, replica.ranks, strict=True):
        share = rates[name] / sum(rates.values())
        assert rank.num_ffn_columns == pytest.approx(share * FFN_COLUMNS, abs=64), split
    assert [line["worker"] for line in said if line["event"] == "plan"] == ["one", "two"], "one plan, the last"


def lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.search(" event=(plan|auto_split) ", line)]
