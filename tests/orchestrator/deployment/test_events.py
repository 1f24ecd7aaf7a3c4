"""People and scripts read what ``serve`` says."""

from unittest import mock

import pytest

from orchestrator.deployment import events
from orchestrator.event_log import LogLevel
from protos.heterodyne.control.v1 import control_pb2


@pytest.mark.parametrize(
    ("num_requests", "words", "pairs"),
    [
        (1, "waiting up to 30 s for 1 request; Ctrl-C again to stop now.", "grace_s=30.0 requests=1"),
        (3, "waiting up to 30 s for 3 requests; Ctrl-C again to stop now.", "grace_s=30.0 requests=3"),
        (0, "no request is in progress.", "grace_s=30.0 requests=0"),
        (None, "waiting up to 30 s for requests in progress; Ctrl-C again to stop now.", "grace_s=30.0"),
    ],
)
def test_draining_says_for_what_it_waits(num_requests: int | None, words: str, pairs: str) -> None:
    said = events.draining(30.0, num_requests)
    assert said.sentence == f"Stopping: {words}" and said.pairs() == f"event=draining {pairs}"


def test_a_replica_that_fails_says_why_and_one_that_changes_says_to_what() -> None:
    failed = control_pb2.Replica(name="replica-0", phase=control_pb2.PHASE_FAILED, cause="rank 0: killed")
    said = events.replica_changed(failed)
    assert (said.sentence, said.level) == ("replica-0 failed: rank 0: killed", LogLevel.ERROR)
    assert said.pairs() == 'event=replica replica=replica-0 phase=failed cause="rank 0: killed"'
    ready = events.replica_changed(control_pb2.Replica(name="replica-0", phase=control_pb2.PHASE_READY))
    assert (ready.sentence, ready.level) == ("replica-0 is ready.", LogLevel.INFO)


def test_every_sentence_is_one() -> None:
    said = [
        events.connecting("local"),
        events.connecting("10.0.0.1:6379"),
        events.without_authentication("10.0.0.1:6379"),
        events.without_hosts(),
        events.measuring(2),
        events.controller_lost("UNAVAILABLE"),
        events.drained(),
        events.gateway_killed(),
        events.stopped_before_ready(),
    ]
    for each in said:
        assert each.sentence.endswith(".") and "=" not in each.sentence.replace("RAY_AUTH_MODE=token", "")
        assert each.pairs().startswith(f"event={each.event}")


@pytest.mark.parametrize(
    ("address", "tried"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("gpu-1:50051", "gpu-1:50051"),
        ("0.0.0.0:50051", "127.0.0.1:50051"),
        ("[::]:50051", "[::1]:50051"),
    ],
)
def test_what_is_advised_can_be_connected_to(address: str, tried: str) -> None:
    plan = mock.Mock(model=mock.Mock(max_context_tokens=2048))
    config = mock.Mock()
    config.model.name = "demo"
    said = events.ready(mock.Mock(plan=plan, config=config, model=mock.Mock(max_context_tokens=4096)), address)
    assert said.sentence.endswith(f"--address {tried}") and said.fields["address"] == address
    assert ("every interface" in said.sentence) == (tried != address)
    assert "http" not in said.sentence and "http_address" not in said.fields
    both = events.ready(mock.Mock(plan=plan, config=config, model=mock.Mock(max_context_tokens=4096)), address, address)
    assert f"http://{tried}/v1 (OpenAI API)" in both.sentence and both.fields["http_address"] == address
