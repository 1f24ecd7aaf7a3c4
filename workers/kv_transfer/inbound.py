"""The target's end of the connections over which source ranks of other replicas send keys and values."""

import contextlib
import select
import socket
import time
import zlib
from collections import deque
from dataclasses import dataclass, field

from placement.errors import HeterodyneError
from placement.serving.kv.peers import ReplicaRanks
from workers.kv_transfer.shared_memory import Window, is_same_host, open_window
from workers.kv_transfer.wire import (
    HELLO_BYTES,
    INLINE,
    MAX_PIECE_BYTES,
    Hello,
    Piece,
    pack_about,
    pack_ack,
    pack_welcome,
)
from workers.transport.errors import BadFrame, FencedFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Incoming, Link, Outgoing, outgoing

MOST_CONNECTIONS = 256
_MOST_VISITORS = 32
_MOST_REPLIES = 1024
# A visitor that connects and does not say who it is is turned away after this time.
_HELLO_S = 2.0
_TOO_MANY_FILES_S = 0.05
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))


def keep_alive(sock: socket.socket) -> None:
    """Has the system end a connection whose other end's machine is gone, within some ten seconds."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@dataclass(eq=False, slots=True)
class Inbound:
    """A connection from a source rank that has said who it is.

    Attributes:
        rank: the source rank.
        epoch: the epoch of its replica.
        incarnation: what tells that replica from all others.
        window: memory that both share; None: bodies are in frames.
        heard_s: when its last frame came.
    """

    link: Link
    rank: int
    epoch: int
    incarnation: bytes
    window: Window | None
    heard_s: float = field(default_factory=time.monotonic)
    _incoming: Incoming = field(init=False)
    _replies: deque[Outgoing] = field(default_factory=deque)
    _is_heard: bool = True

    def __post_init__(self) -> None:
        self._incoming = self._next_frame()

    def _next_frame(self) -> Incoming:
        also = frozenset({Kind.KV_FAILED})
        return Incoming(link=self.link, kind=Kind.KV_PIECE, payload=None, max_bytes=MAX_PIECE_BYTES, also=also)

    def is_from(self, replica: ReplicaRanks) -> bool:
        """Tells whether the source rank is one of a replica, and not of another or an earlier one."""
        return (self.epoch, self.incarnation) == (replica.epoch, replica.incarnation)

    @property
    def is_within_frame(self) -> bool:
        """Tells whether a part of a frame has come."""
        return self._incoming.has_begun

    @property
    def events(self) -> int:
        """Returns what to wait for."""
        return select.POLLIN | (select.POLLOUT if self._replies else 0)

    def receive(self) -> tuple[Kind, memoryview] | None:
        """Returns the next frame that has come whole, or None. Raises PeerFailed and BadFrame."""
        if not self._incoming.advance():
            return None
        frame, self._incoming = self._incoming, self._next_frame()
        self.heard_s = time.monotonic()
        assert frame.payload is not None
        return frame.kind, frame.payload

    def body(self, piece: Piece, memory: memoryview, inline: memoryview) -> None:
        """Copies the body of a piece to ``memory``. Raises BadFrame where it is damaged."""
        if piece.slot == INLINE:
            memory[:] = inline
            return
        assert self.window is not None
        self.window.read(piece.slot, memory)
        if zlib.crc32(memory) != piece.checksum:
            raise BadFrame(f"a KV_PIECE of {piece.num_bytes} bytes in shared memory is damaged (checksum)")

    def check_slot(self, piece: Piece) -> None:
        """Raises BadFrame where a piece names a slot of shared memory that there is not."""
        if piece.slot != INLINE and (self.window is None or not self.window.has(piece.slot, piece.num_bytes)):
            raise BadFrame(f"a KV_PIECE of {piece.num_bytes} bytes is in slot {piece.slot}, which there is not")

    def acknowledge(self, slot: int) -> None:
        """Tells the source that a slot of shared memory is free again. Raises BadFrame, as :meth:`refuse` does."""
        self._reply(Kind.KV_ACK, pack_ack(slot))

    def refuse(self, transfer_id: bytes) -> None:
        """Tells the source that a transfer is not awaited. Raises BadFrame where it reads none of its answers."""
        self._reply(Kind.KV_REFUSED, pack_about(transfer_id))

    def _reply(self, kind: Kind, payload: memoryview) -> None:
        if len(self._replies) >= _MOST_REPLIES:
            raise BadFrame(f"{_MOST_REPLIES} answers were not read")
        if self._is_heard:
            self._replies.append(outgoing(self.link, kind, payload))

    def flush(self) -> None:
        """Sends the answers that the socket takes now.

        Where the source hears no more, they are dropped: what it has sent may still be read, until its end.
        """
        try:
            while self._replies and self._replies[0].advance():
                self._replies.popleft()
        except PeerFailed:
            self._is_heard = False
            self._replies.clear()

    def close(self) -> None:
        """Closes the connection."""
        self.link.close()
        if self.window is not None:
            self.window.close()


@dataclass(slots=True)
class _Visitor:
    """A connection whose other end has yet to say who it is."""

    link: Link
    hello: Incoming
    deadline_s: float


class Door:
    """Lets source ranks in, and turns all other visitors away.

    Attributes:
        num_refused: visitors that were of a wrong epoch or meant another rank.
    """

    def __init__(self, listener: socket.socket, *, rank: int, epoch: int, shares_memory: bool) -> None:
        self._listener = listener
        self._rank = rank
        self._epoch = epoch
        self._shares_memory = shares_memory
        self._visitors: dict[int, _Visitor] = {}
        self.num_refused = 0

    @property
    def is_closed(self) -> bool:
        """Tells whether nobody can connect any more, as the listener is closed."""
        return self._listener.fileno() < 0

    @property
    def numbers(self) -> list[int]:
        """Lists the descriptors that are to be read."""
        return [self._listener.fileno(), *self._visitors]

    def advance(self, readable: set[int]) -> list[Inbound]:
        """Accepts and hears visitors, and returns those who were let in."""
        entered: list[Inbound] = []
        for number in [number for number in self._visitors if number in readable]:
            inbound = self._hear(self._visitors[number])
            if inbound is not None:
                self._visitors.pop(number)
                entered.append(inbound)
        if self._listener.fileno() in readable:
            self._accept()
        now_s = time.monotonic()
        for number in [number for number, visitor in self._visitors.items() if now_s >= visitor.deadline_s]:
            self._visitors.pop(number).link.close()
        return entered

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # the visitor has left, or this process has too many files open
            time.sleep(_TOO_MANY_FILES_S)
            return
        if len(self._visitors) >= _MOST_VISITORS:  # the one that has been silent for longest makes room
            self._visitors.pop(next(iter(self._visitors))).link.close()
        link = Link(connection, peer=-1, epoch=self._epoch)
        hello = Incoming(link=link, kind=Kind.KV_HELLO, payload=None, max_bytes=HELLO_BYTES)
        self._visitors[connection.fileno()] = _Visitor(link, hello, time.monotonic() + _HELLO_S)

    def _hear(self, visitor: _Visitor) -> Inbound | None:
        """Lets a visitor in, or returns None while its KV_HELLO is not whole, or where it is turned away."""
        try:
            if not visitor.hello.advance():
                return None
            assert visitor.hello.payload is not None
            hello = Hello.unpack(visitor.hello.payload)
            if (hello.target_rank, hello.target_epoch) != (self._rank, self._epoch):
                raise FencedFrame(f"a KV_HELLO is for rank {hello.target_rank} of epoch {hello.target_epoch}")
            return self._let_in(visitor.link, hello)
        except FencedFrame:
            self.num_refused += 1
        except (HeterodyneError, OSError):  # a stranger, or it has left
            pass
        visitor.deadline_s = 0.0
        return None

    def _let_in(self, link: Link, hello: Hello) -> Inbound:
        link.peer = hello.source_rank
        keep_alive(link.socket)
        window = open_window() if self._shares_memory and is_same_host(hello.host) else None
        welcome = outgoing(link, Kind.KV_WELCOME, pack_welcome(window.name if window else None))
        with contextlib.ExitStack() as undo:
            if window is not None:
                undo.callback(window.close)
            if not welcome.advance():  # the socket is new, and takes so little at once
                raise BadFrame("it reads nothing")
            undo.pop_all()
        return Inbound(link, hello.source_rank, hello.source_epoch, hello.source_incarnation, window)

    def close(self) -> None:
        """Turns all visitors away. The listener stays open."""
        for visitor in self._visitors.values():
            visitor.link.close()
        self._visitors.clear()
