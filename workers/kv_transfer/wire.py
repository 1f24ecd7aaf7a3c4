"""The payloads of the frames that carry keys and values between replicas. Pure.

The source rank connects and sends KV_HELLO; the target rank answers with KV_WELCOME, in which it may offer memory that
both share. Then the source sends KV_PIECE frames, and the target answers KV_ACK where the body of one came through
shared memory, and KV_REFUSED where the transfer is not, or no longer, awaited. KV_FAILED says that no more of a
transfer will come.
"""

import struct
from dataclasses import astuple, dataclass
from typing import Any

from placement.model.part import Span
from placement.serving.kv.peers import INCARNATION_BYTES, TRANSFER_ID_BYTES
from workers.transport.errors import BadFrame

HOST_BYTES = 16
NONCE_BYTES = 16
MAX_BODY_BYTES = 4 << 20
"""The most bytes of keys and values in one frame."""

INLINE = 0xFFFFFFFF
"""The slot of a piece whose body is in its frame."""

_HELLO = struct.Struct(f"<IQ{INCARNATION_BYTES}sIQ{HOST_BYTES}s")
_WINDOW = struct.Struct(f"<II{NONCE_BYTES}sII")
_PIECE = struct.Struct(f"<{TRANSFER_ID_BYTES}sIQQQIII")
_ACK = struct.Struct("<I")
_MOST_CAUSE_BYTES = 512

HELLO_BYTES = _HELLO.size
PIECE_BYTES = _PIECE.size
MAX_REPLY_BYTES = TRANSFER_ID_BYTES + _MOST_CAUSE_BYTES
MAX_PIECE_BYTES = PIECE_BYTES + MAX_BODY_BYTES


@dataclass(frozen=True, slots=True)
class Hello:
    """Says who connects to whom, and on which machine the source runs."""

    source_rank: int
    source_epoch: int
    source_incarnation: bytes
    target_rank: int
    target_epoch: int
    host: bytes

    def pack(self) -> memoryview:
        """Returns the payload of a KV_HELLO frame."""
        return memoryview(_HELLO.pack(*astuple(self)))

    @classmethod
    def unpack(cls, payload: memoryview) -> "Hello":
        """Parses a payload. Raises BadFrame."""
        return cls(*_unpack(_HELLO, payload, "KV_HELLO"))


@dataclass(frozen=True, slots=True)
class WindowName:
    """Names the shared memory that a target rank offers: descriptor ``fd`` of process ``pid``.

    Attributes:
        nonce: the bytes that it begins with.
        slot_bytes: the size of a slot.
        num_slots: how many slots there are.
    """

    pid: int
    fd: int
    nonce: bytes
    slot_bytes: int
    num_slots: int


def pack_welcome(window: WindowName | None) -> memoryview:
    """Returns the payload of a KV_WELCOME frame."""
    return memoryview(b"" if window is None else _WINDOW.pack(*astuple(window)))


def unpack_welcome(payload: memoryview) -> WindowName | None:
    """Parses the payload of a KV_WELCOME frame. Raises BadFrame."""
    return WindowName(*_unpack(_WINDOW, payload, "KV_WELCOME")) if payload.nbytes else None


MAX_WELCOME_BYTES = _WINDOW.size


@dataclass(frozen=True, slots=True)
class Piece:
    """Says what a piece is: a part of what a source rank sends of one layer and portion.

    Attributes:
        layer: a layer of the model.
        first_token: the first token of the portion.
        stop_token: the one after its last.
        offset: the place of the piece's first byte in what the source rank sends of the layer and portion.
        num_bytes: the bytes of its body; zero where the source rank has nothing of the layer and portion.
        slot: the slot of shared memory that has the body, or ``INLINE``.
        checksum: the CRC-32 of a body in shared memory; 0 where the body is in the frame, which has its own.
    """

    transfer_id: bytes
    layer: int
    first_token: int
    stop_token: int
    offset: int
    num_bytes: int
    slot: int = INLINE
    checksum: int = 0

    @property
    def portion(self) -> tuple[int, int]:
        """Returns the first token of the portion and the one after its last."""
        return self.first_token, self.stop_token

    @classmethod
    def of(cls, transfer_id: bytes, layer: int, portion: Span, offset: int, num_bytes: int) -> "Piece":
        """Returns a piece whose body is in its frame."""
        return cls(transfer_id, layer, portion.start, portion.stop, offset, num_bytes)

    def pack(self) -> memoryview:
        """Returns what a KV_PIECE frame begins with."""
        return memoryview(_PIECE.pack(*astuple(self)))


def unpack_piece(payload: memoryview) -> tuple[Piece, memoryview]:
    """Returns what a KV_PIECE frame says, and the body that it has. Raises BadFrame."""
    if payload.nbytes < PIECE_BYTES:
        raise BadFrame(f"a KV_PIECE has {payload.nbytes} bytes, of {PIECE_BYTES} at least")
    piece, body = Piece(*_PIECE.unpack_from(payload)), payload[PIECE_BYTES:]
    if body.nbytes != (piece.num_bytes if piece.slot == INLINE else 0):
        raise BadFrame(f"a KV_PIECE has a body of {body.nbytes} bytes, and says {piece.num_bytes}")
    return piece, body


def pack_ack(slot: int) -> memoryview:
    """Returns the payload of a KV_ACK frame."""
    return memoryview(_ACK.pack(slot))


def unpack_ack(payload: memoryview) -> int:
    """Returns the slot that is free again. Raises BadFrame."""
    slot: int = _unpack(_ACK, payload, "KV_ACK")[0]
    return slot


def pack_about(transfer_id: bytes, cause: str = "") -> memoryview:
    """Returns the payload of a KV_REFUSED or KV_FAILED frame."""
    return memoryview(transfer_id + cause.encode()[:_MOST_CAUSE_BYTES])


def unpack_about(payload: memoryview) -> tuple[bytes, str]:
    """Returns the transfer and the cause of a KV_REFUSED or KV_FAILED frame. Raises BadFrame."""
    if not TRANSFER_ID_BYTES <= payload.nbytes <= MAX_REPLY_BYTES:
        raise BadFrame(f"a frame about a transfer has {payload.nbytes} bytes")
    return bytes(payload[:TRANSFER_ID_BYTES]), bytes(payload[TRANSFER_ID_BYTES:]).decode(errors="replace")


def _unpack(form: struct.Struct, payload: memoryview, kind: str) -> tuple[Any, ...]:
    if payload.nbytes != form.size:
        raise BadFrame(f"a {kind} has {payload.nbytes} bytes, not {form.size}")
    return form.unpack(payload)
