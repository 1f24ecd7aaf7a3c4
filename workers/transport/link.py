"""A connection between two ranks, and the one function that moves frames over many of them at once."""

import contextlib
import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import HEADER_BYTES, Header, Kind, header, parse

MAX_MESSAGE_BYTES = 64 << 20
"""Of a frame whose length the receiver does not know beforehand."""

# While it waits, a rank looks this often whether the others still live.
_LOOK_S = 0.1
_READ, _WRITE = select.POLLIN, select.POLLOUT


class Link:
    """One end of a TCP connection to another rank. For one thread at a time.

    Attributes:
        peer: the other rank.
    """

    def __init__(self, sock: socket.socket, *, peer: int, epoch: int) -> None:
        """Takes the socket over."""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.peer = peer
        self.epoch = epoch
        self.num_sent = 0
        self.num_received = 0

    def close(self) -> None:
        """End the connection: whoever waits at either end hears of it."""
        with contextlib.suppress(OSError):  # not connected any more
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What is to go over a link, one frame each way at most.

    Attributes:
        send: a payload.
        receive: memory of exactly the payload that must come.
    """

    link: Link
    send: memoryview | None = None
    receive: memoryview | None = None


@dataclass(slots=True)
class Outgoing:
    """The rest of a frame that is being sent; an empty list once it is."""

    link: Link
    parts: list[memoryview]

    def go_on(self) -> bool:
        """Sends what can be sent now; whether that was all."""
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


@dataclass(slots=True)
class Incoming:
    """A frame that is being received: its header, then ``payload``, which is found or made when that is known."""

    link: Link
    kind: Kind
    payload: memoryview | None
    max_bytes: int
    _head: memoryview = field(default_factory=lambda: memoryview(bytearray(HEADER_BYTES)))
    _header: Header | None = None
    _done: int = 0  # of the header, then of the payload

    def go_on(self) -> bool:
        """Receives what has come; whether that was all."""
        if self._header is None:
            if not self._fill(self._head):
                return False
            self._header, self._done = self._begin(), 0
        assert self.payload is not None
        if not self._fill(self.payload):
            return False
        self._header.check(self.payload)
        self.link.num_received += 1
        if self.kind is Kind.FAILED:
            raise PeerFailed(self.link.peer, bytes(self.payload).decode(errors="replace"))
        return True

    def _begin(self) -> Header:
        """The header, which has come, and a place for what it announces."""
        parsed = parse(self._head, epoch=self.link.epoch, number=self.link.num_received)
        if parsed.kind is Kind.FAILED and self.kind is not Kind.FAILED:
            self.kind, self.payload = Kind.FAILED, None
        if parsed.kind is not self.kind:
            raise BadFrame(f"a {parsed.kind.name} frame came where a {self.kind.name} was due")
        if self.payload is None:
            if parsed.length > self.max_bytes:
                raise BadFrame(f"a {parsed.kind.name} frame has {parsed.length} bytes, of {self.max_bytes} at most")
            self.payload = memoryview(bytearray(parsed.length))
        if parsed.length != self.payload.nbytes:
            raise BadFrame(f"a {parsed.kind.name} frame has {parsed.length} bytes, not {self.payload.nbytes}")
        return parsed

    def _fill(self, whole: memoryview) -> bool:
        """Receives what has come of it; whether it is whole."""
        while self._done < whole.nbytes:
            try:
                count = self.link.socket.recv_into(whole[self._done :])
            except BlockingIOError:
                return False
            except OSError as error:
                raise broken(self.link, error) from error
            if not count:
                raise PeerFailed(self.link.peer, "closed its connection")
            self._done += count
        return True


def broken(link: Link, error: OSError) -> PeerFailed:
    """What a socket's error says of the rank at its other end."""
    if link.socket.fileno() < 0:
        return PeerFailed(link.peer, "the connection with it was ended here")
    return PeerFailed(link.peer, f"its connection broke ({error.strerror or type(error).__name__})")


def move(transfers: Sequence[Transfer], *, deadline_s: float, alive: Callable[[], None] = lambda: None) -> None:
    """Sends and receives TENSOR frames over several links, all at once: none waits for another.

    Args:
        transfers: one a link.
        deadline_s: by :func:`time.monotonic`.
        alive: called again and again while this waits; raises where a rank is known to be lost.

    Raises:
        PeerFailed: a connection broke, or is not done by the deadline.
        BadFrame: what came is not what was due.
    """
    going = [outgoing(t.link, Kind.TENSOR, t.send) for t in transfers if t.send is not None]
    coming = [
        Incoming(link=t.link, kind=Kind.TENSOR, payload=t.receive, max_bytes=0)
        for t in transfers
        if t.receive is not None
    ]
    _finish(going, coming, deadline_s, alive)


def send(
    link: Link, kind: Kind, payload: memoryview, *, deadline_s: float, alive: Callable[[], None] = lambda: None
) -> None:
    """Sends one frame. Raises as :func:`move`."""
    _finish([outgoing(link, kind, payload)], [], deadline_s, alive)


def receive(
    link: Link,
    kind: Kind,
    *,
    deadline_s: float,
    alive: Callable[[], None] = lambda: None,
    max_bytes: int = MAX_MESSAGE_BYTES,
) -> memoryview:
    """Receives one frame of at most ``max_bytes``. Raises as :func:`move`."""
    coming = Incoming(link=link, kind=kind, payload=None, max_bytes=max_bytes)
    _finish([], [coming], deadline_s, alive)
    assert coming.payload is not None
    return coming.payload


def outgoing(link: Link, kind: Kind, payload: memoryview) -> Outgoing:
    """A frame, none of which is sent yet. It must be sent whole before the next."""
    head = memoryview(header(kind, payload, epoch=link.epoch, number=link.num_sent))
    link.num_sent += 1
    return Outgoing(link=link, parts=[head, payload] if payload.nbytes else [head])


def _finish(going: list[Outgoing], coming: list[Incoming], deadline_s: float, alive: Callable[[], None]) -> None:
    while True:
        going = [one for one in going if not one.go_on()]
        coming = [one for one in coming if not one.go_on()]
        if not going and not coming:
            return
        _wait(going, coming, deadline_s)
        alive()


def _wait(going: Sequence[Outgoing], coming: Sequence[Incoming], deadline_s: float) -> None:
    """Until something can go on, or for a moment. Raises PeerFailed past the deadline."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        awaited = coming[0].link if coming else going[0].link
        raise PeerFailed(awaited.peer, "did not answer in time")
    events: dict[int, int] = {}
    for one in going:
        events[one.link.socket.fileno()] = _WRITE
    for other in coming:
        number = other.link.socket.fileno()
        events[number] = events.get(number, 0) | _READ
    poll = select.poll()
    for number, what in events.items():
        if number >= 0:  # else it was ended here, which the next look finds
            poll.register(number, what)
    poll.poll(1000 * min(left_s, _LOOK_S))
