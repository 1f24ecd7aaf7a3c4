"""What a client reads while no replica takes requests."""

from typing import Any

from orchestrator.gateway.fleet.unready import why_unready
from protos.heterodyne.control.v1 import control_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2


def replica(number: int, phase: Any, *ranks: pb.Rank, cause: str = "") -> pb.Replica:
    return pb.Replica(name=f"replica-{number}", phase=phase, ranks=ranks, cause=cause)


def loading(loaded: int, total: int, phase: Any = worker_pb2.LOAD_PHASE_WEIGHTS) -> pb.Rank:
    return pb.Rank(phase=pb.PHASE_LOADING, load_phase=phase, loaded_bytes=loaded, total_bytes=total)


def why(*replicas: pb.Replica, **lost: str) -> str:
    words = why_unready(pb.WatchResponse(replicas=replicas), {name.replace("_", "-"): lost[name] for name in lost})
    return words.removeprefix("no replica takes requests: ")


def test_loading_is_told_by_how_much_is_loaded_or_by_what_is_done() -> None:
    half = replica(0, pb.PHASE_LOADING, loading(100, 100), loading(74, 100))
    compiling = replica(1, pb.PHASE_LOADING, loading(100, 100, worker_pb2.LOAD_PHASE_COMPILE))
    assert why(half) == "still loading (replica-0: 87%)"
    assert why(half, compiling) == "still loading (replica-0: 87%, replica-1: compiling)"
    starting = replica(0, pb.PHASE_STARTING, pb.Rank(phase=pb.PHASE_STARTING, weight_bytes=10))
    assert why(starting) == "still loading (replica-0: starting)"


def test_a_replica_that_failed_says_why() -> None:
    failed = replica(0, pb.PHASE_FAILED, cause="rank 0 of replica-0 on big: worker process 7 was killed by SIGKILL")
    assert why(failed) == f"replica-0 failed: {failed.cause}"
    still_ready = replica(0, pb.PHASE_READY)
    assert why(still_ready, replica_0="no heartbeat for 3 s") == "replica-0 failed: no heartbeat for 3 s"
    long = replica(0, pb.PHASE_FAILED, cause="x\n" * 5000)
    assert len(why(long)) < 250 and why(long).isprintable()


def test_before_anything_is_known_the_service_is_starting() -> None:
    assert why() == "the service is starting"
    assert why(replica(0, pb.PHASE_READY)) == "replica-0 is ready and is being connected to"
    assert why(replica(0, pb.PHASE_STOPPED)) == "replica-0 was stopped"
