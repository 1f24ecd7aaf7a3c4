"""What a client reads while no replica takes requests."""

from collections.abc import Mapping
from typing import Any

import pytest

from orchestrator.gateway.fleet.inbox import Loss
from orchestrator.gateway.fleet.unready import why_unready
from protos.heterodyne.control.v1 import control_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2


def replica(number: int, phase: Any, *ranks: pb.Rank, cause: str = "") -> pb.Replica:
    return pb.Replica(name=f"replica-{number}", phase=phase, ranks=ranks, cause=cause)


def loading(loaded: int, total: int, phase: Any = worker_pb2.LOAD_PHASE_WEIGHTS) -> pb.Rank:
    return pb.Rank(phase=pb.PHASE_LOADING, load_phase=phase, loaded_bytes=loaded, total_bytes=total)


def why(*replicas: pb.Replica, lost: Mapping[tuple[str, int], Loss] | None = None) -> str:
    words = why_unready(pb.WatchResponse(replicas=replicas), lost or {})
    return words.removeprefix("no replica takes requests: ")


def test_loading_is_told_by_how_much_is_loaded_or_by_what_is_done() -> None:
    half = replica(0, pb.PHASE_LOADING, loading(100, 100), loading(74, 100))
    compiling = replica(1, pb.PHASE_LOADING, loading(100, 100, worker_pb2.LOAD_PHASE_COMPILE))
    assert why(half) == "still loading (replica-0: 87%)"
    assert why(half, compiling) == "still loading (replica-0: 87%, replica-1: compiling)"
    starting = replica(0, pb.PHASE_STARTING, pb.Rank(phase=pb.PHASE_STARTING, weight_bytes=10))
    assert why(starting) == "still loading (replica-0: starting)"


@pytest.mark.parametrize("kind", list(Loss))
def test_a_client_reads_the_kind_of_loss_and_not_its_cause(kind: Loss) -> None:
    failed = replica(0, pb.PHASE_FAILED, cause="rank 0 on node 10.0.0.7: worker process 7 was killed, see /srv/x")
    lost = {("replica-0", 0): kind}
    assert why(failed, lost=lost) == why(replica(0, pb.PHASE_READY), lost=lost)
    words = why(failed, lost=lost)
    assert words.startswith("replica-0 failed: ")
    assert not any(word in words for word in ("10.0.0.7", "process", "/srv"))


def test_a_failed_replica_that_never_served_could_not_be_started() -> None:
    failed = replica(0, pb.PHASE_FAILED, cause="no memory on big")
    assert why(failed, lost={("replica-0", 7): Loss.STALLED}) == "replica-0 failed: it could not be started"


def test_before_anything_is_known_the_service_is_starting() -> None:
    assert why() == "the service is starting"
    assert why(replica(0, pb.PHASE_READY)) == "replica-0 is ready and is being connected to"
    assert why(replica(0, pb.PHASE_STOPPED)) == "replica-0 was stopped"
