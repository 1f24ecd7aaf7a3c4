"""Converts what replicas know of each other to messages of the worker protocol and back. Pure."""

from placement.errors import InvalidRequest
from placement.model.specs import ModelSpec
from placement.serving.kv.peers import INCARNATION_BYTES, TRANSFER_ID_BYTES, KvFormat, ReplicaRanks
from protos.codec.formats import dtype_message, read_dtype
from protos.codec.parts import read_part, shard_message
from protos.heterodyne.worker.v1 import worker_pb2 as pb

_FORMATS = {KvFormat.NATIVE: pb.KV_FORMAT_NATIVE, KvFormat.INT8: pb.KV_FORMAT_INT8}
_FORMAT_OF = {number: kind for kind, number in _FORMATS.items()}
_MOST_BLOCK_SIZE = 1 << 20
# Each rank may have a thread of its own that sends to it, so nobody may name any number of them.
_MOST_RANKS = 1024


def kv_format_message(kind: KvFormat) -> pb.KvFormat.ValueType:
    """Returns the message of a format."""
    return _FORMATS[kind]


def read_kv_format(number: pb.KvFormat.ValueType) -> KvFormat:
    """Returns the format in a message; NATIVE where none is set. Raises InvalidRequest for one that is not known."""
    if number == pb.KV_FORMAT_UNSPECIFIED:
        return KvFormat.NATIVE
    if number not in _FORMAT_OF:
        raise InvalidRequest(
            field="format", value=number, problem="is not known", fix="Run the same version on every replica."
        )
    return _FORMAT_OF[number]


def ranks_message(ranks: ReplicaRanks) -> pb.ReplicaRanks:
    """Returns the message of a replica's ranks."""
    return pb.ReplicaRanks(
        epoch=ranks.epoch,
        incarnation=ranks.incarnation,
        members=[
            pb.Member(host=host, port=port, shard=shard_message(rank, part))
            for rank, (part, (host, port)) in enumerate(zip(ranks.parts, ranks.addresses, strict=True))
        ],
        dtype=dtype_message(ranks.dtype),
        block_size=ranks.block_size,
        facts=ranks.facts,
    )


def read_ranks(message: pb.ReplicaRanks, model: ModelSpec) -> ReplicaRanks:
    """Returns the ranks of a replica of ``model``. Raises InvalidRequest for what cannot be one."""
    if not 1 <= message.block_size <= _MOST_BLOCK_SIZE:
        raise _refusal("block_size", message.block_size, "is no size of a block")
    if len(message.incarnation) != INCARNATION_BYTES:
        problem = f"is not one of {INCARNATION_BYTES} bytes"
        raise _refusal("incarnation", f"{len(message.incarnation)} bytes", problem)
    if not 1 <= len(message.members) <= _MOST_RANKS:
        raise _refusal("members", f"{len(message.members)} ranks", f"is not 1 to {_MOST_RANKS} ranks")
    for index, member in enumerate(message.members):
        if not member.host or not 0 < member.port < 2**16:
            raise _refusal(f"members[{index}]", f"{member.host}:{member.port}", "is no address")
    return ReplicaRanks(
        epoch=message.epoch,
        incarnation=message.incarnation,
        parts=tuple(
            read_part(member.shard, model, message.block_size, f"members[{index}].shard")
            for index, member in enumerate(message.members)
        ),
        addresses=tuple((member.host, member.port) for member in message.members),
        dtype=read_dtype(message.dtype),
        block_size=message.block_size,
        facts=dict(message.facts),
    )


def read_transfer_id(transfer_id: bytes) -> bytes:
    """Returns the name of a transfer. Raises InvalidRequest for what is none."""
    if len(transfer_id) != TRANSFER_ID_BYTES:
        raise _refusal("transfer_id", f"{len(transfer_id)} bytes", f"is not one of {TRANSFER_ID_BYTES} bytes")
    return transfer_id


def _refusal(field: str, value: object, problem: str) -> InvalidRequest:
    return InvalidRequest(field=field, value=value, problem=problem, fix="Run the same version on every replica.")
