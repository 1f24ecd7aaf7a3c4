"""The frame format of connections between ranks. Pure.

A header of fixed size gives the kind and the length of the payload before anything is allocated for it. Each direction
of a connection numbers its frames, so that a lost, repeated or reordered one is noticed. The checksum (CRC-32) covers
header and payload.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from workers.transport.errors import BadFrame, FencedFrame

MAGIC = b"HetF"
FORMAT = 1
"""The version of the format. The frames by which ranks join each other, HELLO, WELCOME and FACTS, are the same in all
versions; in a FACTS frame each rank says which version it writes from then on.
"""

_FIELDS = struct.Struct("<4sB3xQQQ")  # magic, kind, epoch, number, length of the payload
_CHECKSUM = struct.Struct("<I")

FIELD_BYTES = _FIELDS.size
HEADER_BYTES = FIELD_BYTES + _CHECKSUM.size


class Kind(IntEnum):
    """The kinds of frames, by what they carry."""

    HELLO = 1
    WELCOME = 2
    PULSE = 3
    FAILED = 4
    TENSOR = 5
    STEP = 6
    BEGIN = 7
    FACTS = 8
    KV_HELLO = 9
    KV_WELCOME = 10
    KV_PIECE = 11
    KV_ACK = 12
    KV_REFUSED = 13
    KV_FAILED = 14
    KV_COMMAND = 15
    ATTENTION_CHALLENGE = 16
    ATTENTION_HELLO = 17
    ATTENTION_WELCOME = 18
    ATTENTION_REFUSED = 19
    ATTENTION_ORDER = 20
    ATTENTION_ROWS = 21
    ATTENTION_RESULT = 22


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header.

    Attributes:
        length: bytes of the payload.
        fields: the bytes that the checksum covers before those of the payload.
    """

    kind: Kind
    length: int
    fields: bytes
    checksum: int

    def check(self, payload: bytearray | memoryview) -> None:
        """Raises BadFrame where the checksum of ``payload`` is not the one in the header."""
        if zlib.crc32(payload, zlib.crc32(self.fields)) != self.checksum:
            raise BadFrame(f"a {self.kind.name} frame of {self.length} bytes is damaged (checksum)")


def header(kind: Kind, *payload: memoryview, epoch: int, number: int) -> bytes:
    """Returns the header that goes before ``payload``, whose parts follow each other."""
    fields = _FIELDS.pack(MAGIC, kind, epoch, number, sum(part.nbytes for part in payload))
    checksum = zlib.crc32(fields)
    for part in payload:
        checksum = zlib.crc32(part, checksum)
    return fields + _CHECKSUM.pack(checksum)


def parse(data: bytes | memoryview, *, epoch: int, number: int) -> Header:
    """Parses a header that :func:`header` made.

    Args:
        data: ``HEADER_BYTES`` bytes.
        epoch: the epoch of this replica.
        number: the number that the frame must have.

    Raises:
        BadFrame: the bytes are not a header, the frame is of another epoch, or it is not the next one.
    """
    magic, kind, frame_epoch, frame_number, length = _FIELDS.unpack_from(data)
    if magic != MAGIC or kind not in Kind._value2member_map_:
        raise BadFrame(f"no frame begins with {bytes(data[:8])!r}")
    if frame_epoch != epoch:
        raise FencedFrame(f"a frame of epoch {frame_epoch} is fenced: this replica is at epoch {epoch}")
    if frame_number != number:
        raise BadFrame(f"frame {frame_number} came where {number} was due")
    return Header(
        kind=Kind(kind),
        length=length,
        fields=bytes(data[:FIELD_BYTES]),
        checksum=_CHECKSUM.unpack_from(data, FIELD_BYTES)[0],
    )
