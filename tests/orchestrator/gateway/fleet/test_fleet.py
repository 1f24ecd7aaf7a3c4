import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from orchestrator.gateway.errors import ReplicaUnavailable
from orchestrator.gateway.fleet.fleet import Fleet
from orchestrator.gateway.fleet.leader import LeaderLimits
from placement.planning.limits import ReplicaLimits
from placement.serving.routing.router import Prompt
from protos.heterodyne.control.v1 import control_pb2, control_pb2_grpc
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc
from tests.support.gateway.stub_gateway import EPOCH, StubWorker

NAMES = ("replica-0", "replica-1")
SIZES = ReplicaLimits(block_size=4, token_budget=64, max_num_seqs=8)
LIMITS = LeaderLimits(heartbeat_timeout_s=60.0, stall_timeout_s=60.0)
PATIENCE_S = 20.0


class StubController(control_pb2_grpc.ControlServicer):
    """Tells of one deployment, and of no change."""

    def __init__(self, deployment: control_pb2.WatchResponse) -> None:
        self._deployment = deployment

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[control_pb2.WatchResponse]:
        yield self._deployment
        await asyncio.Event().wait()


@asynccontextmanager
async def two_replicas() -> AsyncIterator[tuple[Fleet, dict[str, StubWorker], list[tuple[str, pb.StepOutput]]]]:
    """A fleet of two replicas that are idle and ready; the workers are the test's, which sees the steps."""
    server = grpc.aio.server()
    workers: dict[str, StubWorker] = {}
    replicas, servers = [], [server]
    for name in NAMES:
        workers[name], worker_server = StubWorker(), grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(workers[name], worker_server)
        rank = control_pb2.Rank(address=f"127.0.0.1:{worker_server.add_insecure_port('127.0.0.1:0')}")
        ready = control_pb2.Replica(name=name, epoch=EPOCH, phase=control_pb2.PHASE_READY, ranks=[rank])
        replicas.append(ready)
        servers.append(worker_server)
    deployment = control_pb2.WatchResponse(version=1, phase=control_pb2.PHASE_READY, replicas=replicas)
    control_pb2_grpc.add_ControlServicer_to_server(StubController(deployment), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    steps: list[tuple[str, pb.StepOutput]] = []
    fleet = Fleet(
        control_address=address,
        limits=LIMITS,
        sizes=SIZES,
        on_change=lambda: None,
        on_step=lambda name, step: steps.append((name, step)),
    )
    for each in servers:
        await each.start()
    following = asyncio.create_task(fleet.follow())
    try:
        for worker in workers.values():
            report(worker, pending_tokens=0)
        async with asyncio.timeout(PATIENCE_S):
            while len(fleet.loads()) < len(NAMES):
                await asyncio.sleep(0.01)
        yield fleet, workers, steps
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following
        await fleet.close()
        for each in servers:
            await each.stop(None)


def report(worker: StubWorker, *, pending_tokens: int) -> None:
    load = pb.LoadReport(pending_tokens=pending_tokens, free_blocks=50, total_blocks=50)
    worker.replies.put_nowait(pb.LeadResponse(epoch=EPOCH, load=load))


async def test_requests_go_where_measured_steps_say_that_the_first_token_comes_soonest() -> None:
    async with two_replicas() as (fleet, workers, steps):
        for name, duration_s in zip(NAMES, (2.0, 0.02), strict=True):
            step = pb.StepOutput(step=1, duration_s=duration_s, num_tokens=20, num_prefill_tokens=20)
            ended = pb.StepOutput(
                step=2,
                duration_s=duration_s,
                num_tokens=1,
                num_decodes=1,
                sequences=[
                    pb.SequenceOutput(sequence_id=1, index=8, end=pb.End(reason=pb.END_REASON_LENGTH)),
                    pb.SequenceOutput(sequence_id=2, end=pb.End(reason=pb.END_REASON_CANCELLED)),
                ],
            )
            for output in (step, ended):
                workers[name].replies.put_nowait(pb.LeadResponse(epoch=EPOCH, step=output))
        report(workers["replica-1"], pending_tokens=500)
        async with asyncio.timeout(PATIENCE_S):
            while len(steps) < 4 or max(load.pending_tokens for load in fleet.loads()) < 500:
                await asyncio.sleep(0.01)
        bound = await fleet.route(Prompt(token_ids=range(20)))
        route = bound.route
        assert bound.leader.name == route.replica == "replica-1"
        assert "500 pending and 20 new tokens, at 1e+03 tokens/s" in route.reason
        assert route.reason.endswith("next of 2 is replica-0 in 2 s")


async def test_no_request_is_routed_by_a_fleet_that_was_stopped() -> None:
    async with two_replicas() as (fleet, _, _):
        fleet.stop()
        with pytest.raises(ReplicaUnavailable, match="stopped"):
            await fleet.route(Prompt(token_ids=[1]))
