"""The source's end of a connection over which keys and values go to a rank of another replica."""

import select
import socket
import time
import zlib
from collections.abc import Callable
from dataclasses import replace

from workers.kv_transfer.inbound import keep_alive
from workers.kv_transfer.shared_memory import open_remote
from workers.kv_transfer.wire import (
    MAX_BODY_BYTES,
    MAX_REPLY_BYTES,
    MAX_WELCOME_BYTES,
    Hello,
    Piece,
    pack_about,
    unpack_about,
    unpack_ack,
    unpack_welcome,
)
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Incoming, Link, outgoing, receive, send

CONNECT_S = 2.0
# A connection over which nothing moves for so long, although there is something to send, is given up.
_STALL_S = 10.0
_CHECK_S = 0.1


class Unreachable(PeerFailed):
    """Nobody listens at the target rank's address, or the network does not lead there."""


class Outbound:
    """A connection with a target rank that has let this source rank in. One thread uses it."""

    def __init__(self, link: Link, window_name: memoryview, alive: Callable[[], None]) -> None:
        """Takes over a link whose KV_WELCOME has come. ``alive`` raises where this end is to stop. Raises BadFrame."""
        self._link = link
        self._alive = alive
        self._incoming = self._next_frame()
        self._refused: list[bytes] = []
        self._window = open_remote(unpack_welcome(window_name))

    @classmethod
    def connect(cls, address: tuple[str, int], hello: Hello, alive: Callable[[], None]) -> "Outbound":
        """Connects to a target rank.

        Raises:
            Unreachable: it is not there within ``CONNECT_S``.
            PeerFailed: it does not let this rank in within as long.
            BadFrame: what listens there is something else.
        """
        host, port = address
        try:
            sock = socket.create_connection(address, timeout=CONNECT_S)
        except OSError as error:
            cause = error.strerror or type(error).__name__
            raise Unreachable(hello.target_rank, f"could not be reached at {host}:{port} ({cause})") from error
        link = Link(sock, peer=hello.target_rank, epoch=hello.target_epoch)
        try:
            keep_alive(sock)
            deadline_s = time.monotonic() + CONNECT_S
            send(link, Kind.KV_HELLO, hello.pack(), deadline_s=deadline_s, alive=alive)
            welcome = receive(link, Kind.KV_WELCOME, deadline_s=deadline_s, alive=alive, max_bytes=MAX_WELCOME_BYTES)
            return cls(link, welcome, alive)
        except BaseException:  # also what ``alive`` raises
            link.close()
            raise

    def _next_frame(self) -> Incoming:
        also = frozenset({Kind.KV_REFUSED})
        return Incoming(link=self._link, kind=Kind.KV_ACK, payload=None, max_bytes=MAX_REPLY_BYTES, also=also)

    def hear(self) -> list[bytes]:
        """Returns the transfers that the target has refused since the last call. Raises PeerFailed and BadFrame."""
        while self._incoming.advance():
            frame, self._incoming = self._incoming, self._next_frame()
            assert frame.payload is not None
            if frame.kind is Kind.KV_REFUSED:
                self._refused.append(unpack_about(frame.payload)[0])
            elif self._window is None:
                raise BadFrame("a KV_ACK came where no memory is shared")
            else:
                self._window.release(unpack_ack(frame.payload))
        refused, self._refused = self._refused, []
        return refused

    def send_layer(self, piece: Piece, body: memoryview) -> None:
        """Sends the bytes of a layer and portion, of which ``piece`` is the description, in pieces.

        Raises:
            PeerFailed: the connection broke, or nothing moved for a while.
            BadFrame: an answer is damaged.
        """
        most_bytes = MAX_BODY_BYTES if self._window is None else min(MAX_BODY_BYTES, self._window.slot_bytes)
        start = 0
        while True:
            part = body[start : start + most_bytes]
            self._send_piece(replace(piece, offset=start, num_bytes=part.nbytes), part)
            start += part.nbytes
            if start >= body.nbytes:
                return

    def _send_piece(self, piece: Piece, body: memoryview) -> None:
        if self._window is not None and body.nbytes:
            self._await_slot()
            slot = self._window.free.pop()
            try:
                self._window.write(slot, body)
            except OSError as error:
                raise PeerFailed(self._link.peer, f"its shared memory cannot be written ({error.strerror})") from error
            self._send(Kind.KV_PIECE, replace(piece, slot=slot, checksum=zlib.crc32(body)).pack())
        else:
            self._send(Kind.KV_PIECE, piece.pack(), body)

    def _await_slot(self) -> None:
        """Waits until a slot of shared memory is free. Raises PeerFailed where none is for a while."""
        assert self._window is not None
        deadline_s = time.monotonic() + _STALL_S
        while not self._window.free:
            self._wait(select.POLLIN, deadline_s)
            self._refused = self.hear()

    def fail(self, transfer_id: bytes, cause: str) -> None:
        """Tells the target that no more of a transfer will come. Raises as :meth:`send_layer` does."""
        self._send(Kind.KV_FAILED, pack_about(transfer_id, cause))

    def _send(self, kind: Kind, *payload: memoryview) -> None:
        frame = outgoing(self._link, kind, *payload)
        deadline_s, left = time.monotonic() + _STALL_S, -1
        while not frame.advance():
            now_left = sum(part.nbytes for part in frame.parts)
            if now_left != left:
                deadline_s, left = time.monotonic() + _STALL_S, now_left
            self._wait(select.POLLOUT, deadline_s)

    def _wait(self, events: int, deadline_s: float) -> None:
        """Waits a moment for the socket. Raises PeerFailed past the deadline, and what ``alive`` does."""
        self._alive()
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise PeerFailed.timed_out(self._link.peer)
        poll = select.poll()
        poll.register(self._link.socket.fileno(), events)
        poll.poll(1000 * min(left_s, _CHECK_S))

    def close(self) -> None:
        """Closes the connection."""
        self._link.close()
        if self._window is not None:
            self._window.close()
