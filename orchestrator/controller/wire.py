"""Writes the controller's state as the control protocol's messages. Pure."""

import math
from collections.abc import Sequence

from orchestrator.controller.events import Member
from orchestrator.controller.state import Phase, RankState, ReplicaState, State
from placement.measured.speed import DeviceSpeed
from placement.planning.held import held
from placement.planning.plan import Plan
from protos.codec.formats import dtype_message
from protos.codec.loading import LOAD_PHASES, Loading, part_of
from protos.codec.measured import measured_message
from protos.codec.parts import shard_message
from protos.codec.roles import role_message
from protos.heterodyne.control.v1 import control_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

_PHASES = {
    Phase.STARTING: pb.PHASE_STARTING,
    Phase.LOADING: pb.PHASE_LOADING,
    Phase.READY: pb.PHASE_READY,
    Phase.DRAINING: pb.PHASE_DRAINING,
    Phase.FAILED: pb.PHASE_FAILED,
    Phase.STOPPED: pb.PHASE_STOPPED,
}


def loading(phase: worker_pb2.LoadPhase.ValueType) -> Loading:
    """Returns what a worker does that says so."""
    return part_of(phase) or Loading.WEIGHTS


def members(ranks: Sequence[Member]) -> list[worker_pb2.Member]:
    """Returns what each rank of a replica is told of the others."""
    return [
        worker_pb2.Member(
            host=rank.address.rpartition(":")[0].strip("[]"),
            port=rank.ranks_port,
            shard=shard_message(rank.shard.rank, rank.shard.part),
        )
        for rank in ranks
    ]


def attention_workers(ranks: Sequence[Member]) -> list[worker_pb2.AttentionWorker]:
    """Returns where model ranks find the attention workers."""
    return [
        worker_pb2.AttentionWorker(
            host=rank.address.rpartition(":")[0].strip("[]"),
            port=rank.ranks_port,
            name=rank.shard.device.worker,
        )
        for rank in ranks
    ]


def device_speed(message: worker_pb2.MeasureSpeedResponse) -> DeviceSpeed | None:
    """Returns the speed that a worker measured; None where no device can have it."""
    rates = message.weight_bytes_per_s, message.flops_per_s
    if not all(0 < rate < math.inf for rate in rates):
        return None
    return DeviceSpeed(weight_bytes_per_s=rates[0], flops_per_s=rates[1])


def _rank(rank: RankState) -> pb.Rank:
    stripe = rank.shard.part.stripe
    return pb.Rank(
        token_share=None if stripe is None else stripe.share,
        rank=rank.shard.rank,
        node=rank.node or rank.shard.node,
        device=rank.shard.device.name,
        address=rank.address,
        pid=rank.pid,
        shard=shard_message(rank.shard.rank, rank.shard.part),
        phase=_PHASES[rank.phase],
        weight_bytes=rank.shard.weight_bytes,
        kv_bytes=rank.shard.kv_bytes,
        loaded_bytes=rank.loaded_bytes,
        measured=measured_message(rank.measured),
        cause=rank.cause,
        worker=rank.shard.device.worker,
        load_phase=worker_pb2.LOAD_PHASE_UNSPECIFIED if rank.loading is None else LOAD_PHASES[rank.loading],
        total_bytes=rank.total_bytes,
        target=rank.target,
    )


def _replica(replica: ReplicaState) -> pb.Replica:
    return pb.Replica(
        name=replica.name,
        epoch=replica.epoch,
        phase=_PHASES[replica.phase],
        cause=replica.cause,
        ranks=[_rank(rank) for rank in replica.ranks],
        role=role_message(replica.role),
        block_size=replica.block_size,
        dtype=dtype_message(replica.dtype),
    )


def _attention(state: State, plan: Plan | None) -> pb.Replica | None:
    """Returns the message of the attention workers, and what each of them holds."""
    if state.attention is None:
        return None
    message = _replica(state.attention)
    for rank, told in zip(state.attention.ranks, message.ranks, strict=True):
        told.ClearField("shard")
        told.holds = "" if plan is None else "; ".join(map(str, held(plan, rank.shard)))
    return message


def deployment(state: State, *, version: int, plan: Plan | None = None, offloading: str = "") -> pb.WatchResponse:
    """Returns the message of the whole deployment.

    Args:
        plan: says what attention workers hold.
        offloading: what was decided about them, in words.
    """
    return pb.WatchResponse(
        version=version,
        phase=_PHASES[state.phase],
        cause=state.cause,
        dtype=worker_pb2.DTYPE_UNSPECIFIED if state.dtype is None else dtype_message(state.dtype),
        replicas=[_replica(replica) for replica in state.replicas],
        attention=_attention(state, plan),
        offloading=offloading,
    )
