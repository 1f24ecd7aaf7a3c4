"""The sample with an attention worker, through real Ray: it answers, says who holds what, and listens on loopback."""

import grpc
import pytest

from protos.heterodyne.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from protos.heterodyne.v1 import inference_pb2 as pb
from tests.integration import test_readme as readme
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.ray_access import listeners, missing_ss
from tests.support.deploying.service import serve

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def test_the_sample_answers_and_says_who_holds_what() -> None:
    assert readme.SERVE_ATTENTION in readme.commands()
    command, address = serve(config=readme.SERVE_ATTENTION.split()[-1])
    with command:
        with grpc.insecure_channel(address) as channel:
            request = pb.GenerateRequest(prompt="And it came to pass", max_tokens=60, ignore_eos=True)
            responses = list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=2 * PATIENCE_S))
            stub = admin_pb2_grpc.AdminStub(channel)
            status = stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=PATIENCE_S)
        assert responses[-1].finished.usage.completion_tokens == 60
        (worker,) = status.attention.ranks
        assert worker.worker == "memory" and worker.holds.startswith("KV heads 0-3 of 4 of ")
        assert status.replicas[0].load.total_blocks * 16 == 16_384
        assert status.offloading.startswith("Attention is offloaded")
        if missing_ss() is None:
            found = listeners([worker.pid, status.replicas[0].ranks[0].pid])
            assert {each.pid for each in found} == {worker.pid, status.replicas[0].ranks[0].pid}
            assert all(each.on_loopback for each in found)
        output = command.stop_cleanly()
    assert "event=drained" in output and "Traceback" not in output
