import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from orchestrator.gateway.errors import QueueTimeout, ReplicaUnavailable
from orchestrator.gateway.fleet.fleet import Bound, Fleet
from orchestrator.gateway.fleet.inbox import Inbox, Lost
from orchestrator.gateway.fleet.leader import LeaderLimits
from placement.planning.limits import ReplicaLimits
from placement.serving.routing.binding import WaitReason
from placement.serving.routing.choice import RouteKind
from placement.serving.routing.router import Disaggregation, Prompt
from protos.heterodyne.control.v1 import control_pb2, control_pb2_grpc
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc
from tests.support.clocks import turns, until
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
async def two_replicas(
    roles: Sequence[control_pb2.Role.ValueType] = (control_pb2.ROLE_MIXED, control_pb2.ROLE_MIXED),
    disaggregation: Disaggregation = "auto",
) -> AsyncIterator[tuple[Fleet, dict[str, StubWorker], list[tuple[str, pb.StepOutput]]]]:
    """A fleet of two replicas that are idle and ready; the workers are the test's, which sees the steps."""
    server = grpc.aio.server()
    workers: dict[str, StubWorker] = {}
    replicas, servers = [], [server]
    for name, role in zip(NAMES, roles, strict=True):
        workers[name], worker_server = StubWorker(), grpc.aio.server()
        worker_pb2_grpc.add_WorkerServicer_to_server(workers[name], worker_server)
        rank = control_pb2.Rank(address=f"127.0.0.1:{worker_server.add_insecure_port('127.0.0.1:0')}")
        ready = control_pb2.Replica(name=name, epoch=EPOCH, phase=control_pb2.PHASE_READY, ranks=[rank], role=role)
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
        disaggregation=disaggregation,
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


ONE = Prompt(token_ids=[1, 2, 3])
SEQUENCE_IDS = itertools.count(1)


def submitted(bound: Bound, prompt: Prompt = ONE) -> int:
    """Submits a request as it was bound; returns its first sequence."""
    sequences = [next(SEQUENCE_IDS) for _ in range(prompt.num_sequences)]
    forks = [pb.Fork(sequence_id=sequence_id) for sequence_id in sequences]
    bound.submit(pb.Submit(forks=forks, prompt_ids=prompt.token_ids), Inbox())
    return sequences[0]


async def filled(fleet: Fleet) -> dict[int, str]:
    """Takes every place of both replicas; returns the sequences and where they are."""
    sequences = {}
    for _ in range(len(NAMES) * SIZES.max_num_seqs):
        bound = await fleet.route(ONE, timeout_s=0.0)
        sequences[submitted(bound)] = bound.leader.name
    assert sorted(sequences.values()) == sorted(NAMES * SIZES.max_num_seqs)
    return sequences


async def test_what_finds_no_room_waits_in_the_gateway_and_goes_where_a_sequence_ends_before_any_report() -> None:
    async with two_replicas() as (fleet, workers, _):
        sequences = await filled(fleet)
        waiting = asyncio.create_task(fleet.route(ONE))
        await turns()
        assert fleet.num_waiting == 1 and fleet.waiting() == {WaitReason.NO_PLACE: 1}
        ended = next(number for number, name in sequences.items() if name == "replica-1")
        workers["replica-1"].step(pb.SequenceOutput(sequence_id=ended, index=0, end=pb.End()))
        bound = await asyncio.wait_for(waiting, PATIENCE_S)
        assert bound.leader.name == "replica-1" and not fleet.num_waiting
        assert fleet.routes == {RouteKind.ALONE: len(sequences) + 1}
        submitted(bound)
        assert sum(load.num_sequences for load in fleet.loads()) == len(sequences)


async def test_a_request_that_is_cancelled_or_out_of_time_while_it_waits_leaves_nothing_behind() -> None:
    async with two_replicas() as (fleet, _, _):
        sequences = await filled(fleet)
        with pytest.raises(QueueTimeout):
            await fleet.route(ONE, timeout_s=0.01)
        waiting = asyncio.create_task(fleet.route(ONE))
        await turns()
        for number, name in sequences.items():
            leader = fleet.leader(name, EPOCH)
            assert leader is not None
            leader.release(number, cancel=True)
        waiting.cancel()  # in the very turn in which there is room for it
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled() and not fleet.num_waiting
        await turns()
        assert not any(load.num_sequences for load in fleet.loads())


async def test_what_waits_goes_to_the_replicas_that_are_left_and_ends_with_the_last_of_them() -> None:
    async with two_replicas() as (fleet, _, _):
        sequences = await filled(fleet)
        waiting = [asyncio.create_task(fleet.route(ONE)) for _ in range(2)]
        await turns()
        first, second = (fleet.leader(name, EPOCH) for name in NAMES)
        assert first is not None and second is not None
        first.give_up(Lost(cause="killed"))
        second.release(next(number for number, name in sequences.items() if name == "replica-1"), cancel=True)
        bound = await asyncio.wait_for(waiting[0], PATIENCE_S)
        assert bound.leader is second
        submitted(bound)
        second.give_up(Lost(cause="killed"))
        with pytest.raises(ReplicaUnavailable, match="the connection to it broke"):
            await asyncio.wait_for(waiting[1], PATIENCE_S)


async def test_what_waits_ends_when_the_service_is_stopped() -> None:
    async with two_replicas() as (fleet, _, _):
        await filled(fleet)
        waiting = asyncio.create_task(fleet.route(ONE))
        await turns()
        fleet.stop()
        with pytest.raises(ReplicaUnavailable, match="stopped"):
            await asyncio.wait_for(waiting, PATIENCE_S)


POOLS = (control_pb2.ROLE_PREFILL, control_pb2.ROLE_DECODE)


@pytest.mark.parametrize("problem", ["", "the connection broke"])
async def test_a_request_of_two_replicas_is_submitted_to_one_which_is_told_of_the_other(problem: str) -> None:
    async with two_replicas(POOLS, "always") as (fleet, workers, _):
        bound = await fleet.route(ONE)
        prefill, decode = (fleet.leader(name, EPOCH) for name in NAMES)
        assert prefill is not None and decode is not None
        assert bound.leader is decode and bound.helper is prefill
        number = submitted(bound)
        told = await asyncio.wait_for(workers["replica-1"].submits.get(), PATIENCE_S)
        assert told.prefill == pb.PrefillSource(replica="replica-0", epoch=EPOCH, address=prefill.address)
        assert workers["replica-0"].submits.empty()
        at_prefill, at_decode = (leader.replica_load() for leader in (prefill, decode))
        assert (at_prefill.pending_tokens, at_prefill.num_sequences) == (2, 1), "all but the last token"
        assert (at_decode.pending_tokens, at_decode.num_sequences) == (1, 1)
        transfer = pb.KvTransfer(num_tokens=0 if problem else 2, num_bytes=64, exposed_s=0.01, problem=problem)
        workers["replica-1"].step(pb.SequenceOutput(sequence_id=number, index=0, transfer=transfer))
        await until(lambda: bool(fleet.transfers))
        assert fleet.transfers == {("replica-0", "replica-1", not problem): 1}
        assert not prefill.replica_load().num_sequences and decode.replica_load().num_sequences == 1


async def test_the_blocks_that_wait_for_a_prompt_are_taken_until_a_report_knows_of_them() -> None:
    async with two_replicas(POOLS, "always") as (fleet, workers, _):
        prefill, decode = (fleet.leader(name, EPOCH) for name in NAMES)
        assert prefill is not None and decode is not None
        long = Prompt(token_ids=range(160), num_sequences=2)
        number = submitted(await fleet.route(long), long)
        load = decode.replica_load()
        assert (load.free_blocks, load.num_sequences) == (10, 2), "the forks share 40 blocks of the 50"
        waiting = asyncio.create_task(fleet.route(Prompt(token_ids=range(160))))
        await turns()
        assert fleet.waiting() == {WaitReason.NO_BLOCKS: 1}, "there is room for one such prompt only"
        known = pb.LoadReport(num_moving=2, pending_tokens=2, free_blocks=12, total_blocks=50)
        workers["replica-1"].replies.put_nowait(pb.LeadResponse(epoch=EPOCH, load=known))
        await until(lambda: decode.replica_load().num_moving == 2)
        assert decode.replica_load().free_blocks == 12
        decode.release(number, cancel=True)
        assert (await asyncio.wait_for(waiting, PATIENCE_S)).leader is decode


async def test_a_prompt_counts_no_longer_at_the_replica_that_computes_it_once_its_request_is_over() -> None:
    async with two_replicas(POOLS, "always") as (fleet, workers, _):
        for end in ("cancelled", "refused", "lost"):
            number = submitted(await fleet.route(ONE))
            prefill, decode = (fleet.leader(name, EPOCH) for name in NAMES)
            assert prefill is not None and decode is not None
            assert prefill.replica_load().num_sequences == 1
            match end:
                case "cancelled":
                    decode.release(number, cancel=True)
                case "refused":
                    workers["replica-1"].reject(number, 9, "no")
                case "lost":
                    decode.give_up(Lost(cause="killed"))
            await until(lambda leader=prefill: not leader.replica_load().num_sequences)
