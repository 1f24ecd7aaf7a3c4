"""Replicas know each other's ranks as these described themselves, and refuse what cannot be a replica."""

from collections.abc import Callable

import pytest

from placement.errors import InvalidRequest
from placement.model.part import Part, Span
from placement.model.specs import DType
from placement.model.striping import Stripe
from placement.serving.kv.peers import ReplicaRanks
from protos.codec.replica_ranks import ranks_message, read_ranks
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.planning import MODEL


def part(*layers: int, stripe: Stripe | None = None) -> Part:
    return Part(
        layers=Span(*layers), kv_heads=Span(0, 4), ffn_columns=Span(0, 512), vocab_rows=Span(0, 1000), stripe=stripe
    )


RANKS = ReplicaRanks(
    epoch=2**63,
    incarnation=bytes(range(16)),
    parts=(part(0, 3), part(3, 4, stripe=Stripe(0, 5, 16)), part(3, 4, stripe=Stripe(5, 16, 16))),
    addresses=(("10.0.0.1", 1), ("there.example", 65535), ("::1", 80)),
    dtype=DType.BFLOAT16,
    block_size=16,
    facts={"model": "a", "files": "b"},
)


def test_ranks_are_read_as_they_were_written() -> None:
    message = pb.ReplicaRanks.FromString(ranks_message(RANKS).SerializeToString())
    assert read_ranks(message, MODEL) == RANKS


def test_a_replica_may_have_many_ranks() -> None:
    message = ranks_message(RANKS)
    message.members.extend([message.members[0]] * (1024 - 3))
    assert len(read_ranks(message, MODEL).parts) == 1024


def no_incarnation(message: pb.ReplicaRanks) -> None:
    message.ClearField("incarnation")


def long_incarnation(message: pb.ReplicaRanks) -> None:
    message.incarnation += b"x"


def no_members(message: pb.ReplicaRanks) -> None:
    del message.members[:]


def too_many_members(message: pb.ReplicaRanks) -> None:
    message.members.extend([message.members[0]] * (1025 - 3))


def layers_outside_the_model(message: pb.ReplicaRanks) -> None:
    message.members[1].shard.layers.stop = MODEL.num_layers + 1


def no_port(message: pb.ReplicaRanks) -> None:
    message.members[2].port = 0


def no_block_size(message: pb.ReplicaRanks) -> None:
    message.block_size = 0


@pytest.mark.parametrize(
    ("harm", "field"),
    [
        (no_incarnation, "incarnation"),
        (long_incarnation, "incarnation"),
        (no_members, "members"),
        (too_many_members, "members"),
        (layers_outside_the_model, "members[1].shard.layers"),
        (no_port, "members[2]"),
        (no_block_size, "block_size"),
    ],
)
def test_what_cannot_be_a_replica_is_refused(harm: Callable[[pb.ReplicaRanks], None], field: str) -> None:
    message = ranks_message(RANKS)
    harm(message)
    with pytest.raises(InvalidRequest) as refusal:
        read_ranks(message, MODEL)
    assert refusal.value.field == field
