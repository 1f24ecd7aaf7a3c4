"""A connection between two ranks, and the functions that move frames over many connections at once."""

import contextlib
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import HEADER_BYTES, Header, Kind, header, parse

MAX_MESSAGE_BYTES = 64 << 20
"""The largest payload that is accepted where the receiver does not know the length beforehand."""

# While it waits, a rank checks this often whether the others are still alive.
_CHECK_S = 0.1
_READ, _WRITE = select.POLLIN, select.POLLOUT


class Link:
    """One end of a TCP connection to another rank. Each direction is used by one thread at a time.

    Attributes:
        peer: the other rank.
        epoch: the replica's epoch, which every frame carries.
        num_sent: how many frames this end has sent.
        num_received: how many frames this end has received.
    """

    def __init__(self, sock: socket.socket, *, peer: int, epoch: int) -> None:
        """Takes ownership of the connected socket and makes it non-blocking."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.peer = peer
        self.epoch = epoch
        self.num_sent = 0
        self.num_received = 0

    def close(self) -> None:
        """Closes the connection, which wakes whoever waits at either end."""
        with contextlib.suppress(OSError):  # it is no longer connected
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What moves over a link: at most one frame each way.

    Attributes:
        send: the payload to send.
        receive: memory that has exactly the length of the payload that must come.
    """

    link: Link
    send: memoryview | None = None
    receive: memoryview | None = None


@dataclass(slots=True, kw_only=True)
class Outgoing:
    """A frame that is being sent.

    Attributes:
        parts: the bytes that are still to be sent; the list is empty once all are.
    """

    link: Link
    parts: list[memoryview]

    def advance(self) -> bool:
        """Sends what the socket takes now, and returns whether the frame is sent whole. Raises PeerFailed."""
        while self.parts:
            try:
                sent = self.link.socket.sendmsg(self.parts)
            except BlockingIOError:
                return False
            except OSError as error:
                raise broken(self.link, error) from error
            while self.parts and sent >= self.parts[0].nbytes:
                sent -= self.parts.pop(0).nbytes
            if sent:
                self.parts[0] = self.parts[0][sent:]
        return True


@dataclass(slots=True, kw_only=True)
class Incoming:
    """A frame that is being received, first its header and then its payload.

    Attributes:
        kind: the kind of frame that is due, or that has come.
        payload: memory for the payload; None has it allocated once the header gives its length.
        max_bytes: the largest payload that is allocated for.
        also: other kinds that are due as well.
    """

    link: Link
    kind: Kind
    payload: memoryview | None
    max_bytes: int
    also: frozenset[Kind] = frozenset()
    _head: memoryview = field(default_factory=lambda: memoryview(bytearray(HEADER_BYTES)))
    _header: Header | None = None
    _num_filled: int = 0  # bytes of the header, and then bytes of the payload

    @property
    def has_begun(self) -> bool:
        """Tells whether a part of the frame has come."""
        return self._header is not None or self._num_filled > 0

    def advance(self) -> bool:
        """Receives what has come, and returns whether the frame is there whole.

        Raises:
            PeerFailed: the connection broke, or the frame says that the other rank has failed.
            BadFrame: the frame is damaged, or is not the one that is due.
        """
        if self._header is None:
            if not self._fill(self._head):
                return False
            self._header, self._num_filled = self._parse_header(), 0
        assert self.payload is not None
        if not self._fill(self.payload):
            return False
        self._header.check(self.payload)
        self.link.num_received += 1
        if self.kind is Kind.FAILED:
            raise PeerFailed(self.link.peer, bytes(self.payload).decode(errors="replace"))
        return True

    def _parse_header(self) -> Header:
        """Parses the received header and makes sure that there is memory for the payload."""
        parsed = parse(self._head, epoch=self.link.epoch, number=self.link.num_received)
        if parsed.kind is Kind.FAILED and self.kind is not Kind.FAILED:
            self.kind, self.payload = Kind.FAILED, None
        if parsed.kind in self.also:
            self.kind = parsed.kind
        if parsed.kind is not self.kind:
            raise BadFrame.unexpected(parsed.kind.name, self.kind.name)
        if self.payload is None:
            if parsed.length > self.max_bytes:
                raise BadFrame(f"a {parsed.kind.name} frame has {parsed.length} bytes, of {self.max_bytes} at most")
            self.payload = memoryview(bytearray(parsed.length))
        if parsed.length != self.payload.nbytes:
            raise BadFrame(f"a {parsed.kind.name} frame has {parsed.length} bytes, not {self.payload.nbytes}")
        return parsed

    def _fill(self, memory: memoryview) -> bool:
        """Receives what has come into ``memory``, and returns whether it is full."""
        while self._num_filled < memory.nbytes:
            try:
                count = self.link.socket.recv_into(memory[self._num_filled :])
            except BlockingIOError:
                return False
            except OSError as error:
                raise broken(self.link, error) from error
            if not count:
                raise PeerFailed.closed(self.link.peer)
            self._num_filled += count
        return True


def broken(link: Link, error: OSError) -> PeerFailed:
    """Translates a socket's error into one that names the rank at the other end."""
    if link.socket.fileno() < 0:
        return PeerFailed.ended_here(link.peer)
    return PeerFailed(link.peer, f"its connection broke ({error.strerror or type(error).__name__})")


def move(transfers: Sequence[Transfer], *, deadline_s: float, alive: Callable[[], None] = lambda: None) -> None:
    """Sends and receives TENSOR frames over several links at once, so that none waits for another.

    Args:
        transfers: at most one for each link.
        deadline_s: the end of the wait on the clock of :func:`time.monotonic`.
        alive: is called again and again during the wait; it raises where a rank is known to be lost.

    Raises:
        PeerFailed: a connection broke, or a transfer is not done by the deadline.
        BadFrame: a received frame is not the one that was due.
    """
    sending = [outgoing(t.link, Kind.TENSOR, t.send) for t in transfers if t.send is not None]
    receiving = [
        Incoming(link=t.link, kind=Kind.TENSOR, payload=t.receive, max_bytes=0)
        for t in transfers
        if t.receive is not None
    ]
    complete(sending, receiving, deadline_s=deadline_s, alive=alive)


def send(
    link: Link, kind: Kind, payload: memoryview, *, deadline_s: float, alive: Callable[[], None] = lambda: None
) -> None:
    """Sends one frame and returns once the socket has all of it. Raises as :func:`move` does."""
    complete([outgoing(link, kind, payload)], [], deadline_s=deadline_s, alive=alive)


def receive(
    link: Link,
    kind: Kind,
    *,
    deadline_s: float,
    alive: Callable[[], None] = lambda: None,
    max_bytes: int = MAX_MESSAGE_BYTES,
) -> memoryview:
    """Receives one frame of at most ``max_bytes`` and returns its payload. Raises as :func:`move` does."""
    frame = Incoming(link=link, kind=kind, payload=None, max_bytes=max_bytes)
    complete([], [frame], deadline_s=deadline_s, alive=alive)
    assert frame.payload is not None
    return frame.payload


def outgoing(link: Link, kind: Kind, *payload: memoryview) -> Outgoing:
    """Makes the link's next frame, of which nothing is sent yet. Frames must be sent whole and in this order."""
    head = memoryview(header(kind, *payload, epoch=link.epoch, number=link.num_sent))
    link.num_sent += 1
    return Outgoing(link=link, parts=[head, *(part for part in payload if part.nbytes)])


def complete(
    sending: Sequence[Outgoing], receiving: Sequence[Incoming], *, deadline_s: float, alive: Callable[[], None]
) -> None:
    """Sends and receives frames until all are done. Arguments and errors are those of :func:`move`."""
    while True:
        sending = [frame for frame in sending if not frame.advance()]
        receiving = [frame for frame in receiving if not frame.advance()]
        if not sending and not receiving:
            return
        _wait(sending, receiving, deadline_s)
        alive()


def _wait(sending: Sequence[Outgoing], receiving: Sequence[Incoming], deadline_s: float) -> None:
    """Waits until some frame can advance, but only for a moment. Raises PeerFailed past the deadline."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        awaited = receiving[0].link if receiving else sending[0].link
        raise PeerFailed.timed_out(awaited.peer)
    events: dict[int, int] = {}
    for outgoing_frame in sending:
        events[outgoing_frame.link.socket.fileno()] = _WRITE
    for incoming_frame in receiving:
        number = incoming_frame.link.socket.fileno()
        events[number] = events.get(number, 0) | _READ
    poll = select.poll()
    for number, mask in events.items():
        if number >= 0:  # else the link was closed here, which the next attempt reports
            poll.register(number, mask)
    poll.poll(1000 * min(left_s, _CHECK_S))
