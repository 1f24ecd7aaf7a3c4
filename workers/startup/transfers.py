"""Gets a rank ready to exchange keys and values with ranks of other replicas."""

import hashlib
import socket
from dataclasses import dataclass

from placement.model.specs import ModelSpec
from placement.serving.kv.peers import INCARNATION_BYTES, KvFormat, ReplicaRanks
from protos.codec.replica_ranks import read_kv_format
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.host.device import Device
from workers.kv_transfer.rank import RankTransfers
from workers.kv_transfer.receiver import Elsewhere
from workers.model.kv_cache import KVCache
from workers.replica.kv_follower import KvFollower
from workers.replica.kv_leader import KvLeader
from workers.replica.membership import Membership
from workers.startup.checks import CheckedLoad
from workers.startup.facts import rank_facts

_ALIKE = ("version", "frames", "model", "files")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSide:
    """A rank's side of transfers of keys and values.

    Attributes:
        own: the ranks of its replica.
        model: the model.
        rank: its own sender and receiver.
        commands: has the other ranks take part, or takes part as the leader says.
        kv_format: how this replica has keys and values sent to it.
    """

    own: ReplicaRanks
    model: ModelSpec
    rank: RankTransfers
    commands: KvLeader | KvFollower
    kv_format: KvFormat

    def stop(self) -> None:
        """Ends all transfers, and their threads."""
        self.commands.stop()


def open_kv_side(
    request: pb.LoadRequest,
    checked: CheckedLoad,
    device: Device,
    cache: KVCache,
    *,
    listener: socket.socket | None,
    membership: Membership | None,
    elsewhere: Elsewhere | None = None,
) -> KvSide | None:
    """Begins to listen for ranks of other replicas, once those of the own replica have joined.

    Returns None where nobody was told at which address others reach this rank. Raises InvalidRequest.
    """
    if listener is None or not request.members:
        return None
    own = ReplicaRanks(
        epoch=request.epoch,
        incarnation=incarnation(request.token),
        parts=checked.roster.parts,
        addresses=checked.roster.addresses,
        dtype=checked.dtype,
        block_size=checked.limits.block_size,
        facts={topic: rank_facts(request, checked, device).values[topic] for topic in _ALIKE},
    )
    commands = _commands(request, checked, membership)
    rank = RankTransfers(
        rank=checked.roster.rank,
        own=own,
        cache=cache,
        head_dim=checked.model.head_dim,
        listener=listener,
        on_end=commands.ended,
        on_drop=commands.dropped,
        elsewhere=elsewhere,
    )
    commands.use(rank)
    return KvSide(
        own=own, model=checked.model, rank=rank, commands=commands, kv_format=read_kv_format(request.kv_format)
    )


def incarnation(token: bytes) -> bytes:
    """Returns what tells a replica from all others and from its earlier starts, alike at every rank.

    Args:
        token: what the ranks of the replica know each other by. It is a secret, so only a digest of it is told.
    """
    return hashlib.sha256(b"heterodyne replica" + token).digest()[:INCARNATION_BYTES]


def _commands(request: pb.LoadRequest, checked: CheckedLoad, membership: Membership | None) -> KvLeader | KvFollower:
    if membership is None:
        return KvLeader({}, None)
    if checked.leads:
        return membership.kv_leader()
    return membership.kv_follower(checked.model, slot_limit=request.num_blocks * request.block_size)
