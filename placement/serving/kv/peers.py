"""Describes replicas to each other: what one must know of another to exchange keys and values with it."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from placement.model.part import Part, Span
from placement.model.specs import DType

TRANSFER_ID_BYTES = 16
INCARNATION_BYTES = 16


class KvFormat(Enum):
    """How keys and values are written on the way from one replica to another."""

    NATIVE = "native"
    """Numbers are of the type of the replica that sends; the other converts them to its own."""
    INT8 = "int8"
    """Numbers are 8-bit integers, with a scale for each head and block of a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRanks:
    """The ranks of a replica, as another replica knows them.

    Attributes:
        epoch: the epoch of the replica; it grows with each start, and other replicas may have the same.
        incarnation: ``INCARNATION_BYTES`` bytes that no other replica has, nor this one at another start.
        parts: what each rank holds of the model, in the order of ranks.
        addresses: where each rank listens, as (host, port).
        dtype: the number type of its keys and values.
        block_size: tokens of one of its KV blocks.
        facts: what must be alike in replicas that exchange keys and values, by topic.
    """

    epoch: int
    incarnation: bytes
    parts: tuple[Part, ...]
    addresses: tuple[tuple[str, int], ...]
    dtype: DType
    block_size: int
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """Keys and values that go to another replica once a step has computed the last of their tokens.

    Attributes:
        transfer_id: names the transfer.
        tokens: positions in the sequence. The shipments of a transfer follow each other without gaps.
        by_layer: whether each layer goes once the step has computed it, and not all once the step has ended.
    """

    transfer_id: bytes
    tokens: Span
    by_layer: bool = True


def new_transfer_id() -> bytes:
    """Returns a name for a transfer, which nobody can guess."""
    return secrets.token_bytes(TRANSFER_ID_BYTES)


def differing(own: Mapping[str, str], other: Mapping[str, str]) -> Sequence[str]:
    """Lists the topics in which two replicas differ, so that they cannot exchange keys and values."""
    return [topic for topic in sorted({*own, *other}) if own.get(topic) != other.get(topic)]
