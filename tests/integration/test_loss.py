"""A service whose only replica is lost tells its client, and ends."""

import psutil
import pytest

from orchestrator.cli.client import fetch_status
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.service import STOP_S, orchestrator, serve

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_a_service_whose_last_replica_is_killed_tells_its_client_and_ends_with_1() -> None:
    command, address = serve("cluster.workers=[{name: only, threads: 1}]", "gateway.drain_grace_s=200")
    with command:
        (rank,) = fetch_status(address).replicas[0].ranks
        assert rank.worker == "only"
        asks = ["generate", "And it came to pass", "--max-tokens", "1900", "--min-tokens", "1900"]
        with orchestrator(*asks, "--address", address) as client:
            client.wait_for(r"\w+ \w+", PATIENCE_S)
            psutil.Process(rank.pid).kill()
            assert client.process.wait(PATIENCE_S) == 1
            said = client.output()
        assert command.process.wait(STOP_S) == 1, command.output()
        assert not command.family.alive()
        output = command.output()
    assert "error: UNAVAILABLE: " in said and "replica-0" in said, said
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("error: no replica is left, and a lost one is not started again: rank 0 of replica-0"), last
    assert "worker only" in last and "was killed by SIGKILL" in last and "Traceback" not in output
