"""Frames: how a message looks on a connection between two ranks. Pure.

A header of fixed size says what follows and how long it is, before anything is allocated for it. The number counts
the frames of a connection's direction, so that a lost, repeated or reordered one is noticed; the checksum covers header
and payload.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from workers.transport.errors import BadFrame

MAGIC = b"HetF"
_FIELDS = struct.Struct("<4sB3xQQQ")  # magic, kind, epoch, number, length of the payload
_CHECKSUM = struct.Struct("<I")

FIELD_BYTES = _FIELDS.size
HEADER_BYTES = FIELD_BYTES + _CHECKSUM.size


class Kind(IntEnum):
    """What a frame carries."""

    HELLO = 1
    WELCOME = 2
    PULSE = 3
    FAILED = 4
    TENSOR = 5
    STEP = 6
    BEGIN = 7


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says of itself."""

    kind: Kind
    length: int
    fields: bytes
    checksum: int

    def check(self, payload: bytearray | memoryview) -> None:
        """Raises BadFrame where ``payload`` is not what was sent."""
        if zlib.crc32(payload, zlib.crc32(self.fields)) != self.checksum:
            raise BadFrame(f"a {self.kind.name} frame of {self.length} bytes is damaged (checksum)")


def header(kind: Kind, payload: memoryview, *, epoch: int, number: int) -> bytes:
    """The bytes that go before ``payload``."""
    fields = _FIELDS.pack(MAGIC, kind, epoch, number, payload.nbytes)
    return fields + _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(fields)))


def parse(data: bytes | memoryview, *, epoch: int, number: int) -> Header:
    """What :func:`header` wrote.

    Args:
        data: ``HEADER_BYTES`` of it.
        epoch: of this replica.
        number: that the frame must have.

    Raises:
        BadFrame: it is none, or one of another epoch, or not the next.
    """
    magic, kind, its_epoch, its_number, length = _FIELDS.unpack_from(data)
    if magic != MAGIC or kind not in Kind._value2member_map_:
        raise BadFrame(f"no frame begins with {bytes(data[:8])!r}")
    if its_epoch != epoch:
        raise BadFrame(f"a frame of epoch {its_epoch} is fenced: this replica is at epoch {epoch}")
    if its_number != number:
        raise BadFrame(f"frame {its_number} came where {number} was due")
    return Header(
        kind=Kind(kind),
        length=length,
        fields=bytes(data[:FIELD_BYTES]),
        checksum=_CHECKSUM.unpack_from(data, FIELD_BYTES)[0],
    )
