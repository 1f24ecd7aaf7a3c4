"""How the ranks of a replica find each other: every one with every other, over several connections each.

A rank listens from its start; the controller tells all ranks where, with a token that only they know. The higher rank
of two connects. Whoever cannot say the token, the epoch and a rank that is awaited is turned away, and keeps nobody
waiting.
"""

import contextlib
import hmac
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from placement.errors import HeterodyneError
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Incoming, Link, receive, send

TOKEN_BYTES = 32

_HELLO = struct.Struct(f"<{TOKEN_BYTES}sIB")  # token, rank, channel
_RETRY_S = 0.05
_CONNECT_S = 2.0
_LOOK_S = 0.1
# A stranger that connects and says nothing is turned away after this.
_HELLO_S = 2.0


class Channel(IntEnum):
    """What a connection between two ranks is for: each direction is used by one thread at a time."""

    PULSE = 0
    STEPS = 1
    COMPUTE = 2
    STAGES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The ranks of a replica, and which of them this is.

    Attributes:
        addresses: where each rank listens, as (host, port).
        token: ``TOKEN_BYTES``.
    """

    rank: int
    addresses: Sequence[tuple[str, int]]
    epoch: int
    token: bytes

    def __post_init__(self) -> None:
        assert len(self.token) == TOKEN_BYTES and 0 <= self.rank < len(self.addresses), self.rank

    def hello(self, channel: Channel) -> memoryview:
        """What this rank says when it connects."""
        return memoryview(_HELLO.pack(self.token, self.rank, channel))


@dataclass(frozen=True, slots=True)
class Mesh:
    """Connections to all other ranks."""

    links: dict[tuple[int, Channel], Link] = field(default_factory=dict)

    def of(self, channel: Channel) -> dict[int, Link]:
        """The links of a channel, by rank."""
        return {rank: link for (rank, its), link in self.links.items() if its is channel}

    def close(self) -> None:
        """End all connections."""
        for link in self.links.values():
            link.close()


def listen(host: str) -> socket.socket:
    """A socket that listens on a free port of ``host``. Raises OSError."""
    family, kind, protocol, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(where)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def join(
    listener: socket.socket, members: Members, *, deadline_s: float, go_on: Callable[[], None] = lambda: None
) -> Mesh:
    """Connects this rank with all others.

    Args:
        listener: from :func:`listen`; stays open.
        deadline_s: by :func:`time.monotonic`.
        go_on: called again and again; what it raises ends the attempt.

    Raises:
        PeerFailed: a rank was not there by the deadline, or did not take the connection.
    """
    mesh = Mesh()
    try:
        for peer in range(members.rank):
            for channel in Channel:
                mesh.links[peer, channel] = _connect(members, peer, channel, deadline_s, go_on)
        _accept(listener, members, mesh, deadline_s, go_on)
    except BaseException:
        mesh.close()
        raise
    return mesh


def _connect(members: Members, peer: int, channel: Channel, deadline_s: float, go_on: Callable[[], None]) -> Link:
    host, port = members.addresses[peer]
    while True:
        go_on()
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise PeerFailed(peer, f"could not be reached at {host}:{port}")
        try:
            link = Link(
                socket.create_connection((host, port), timeout=min(left_s, _CONNECT_S)), peer=peer, epoch=members.epoch
            )
            break
        except OSError:  # not there yet, or the network is not
            time.sleep(_RETRY_S)
    try:
        send(link, Kind.HELLO, members.hello(channel), deadline_s=deadline_s)
        receive(link, Kind.WELCOME, deadline_s=deadline_s, max_bytes=0)
    except HeterodyneError as error:
        link.close()
        raise PeerFailed(peer, f"did not take the connection: {error}") from error
    return link


@dataclass(slots=True)
class _Visitor:
    """Somebody who has connected, and has yet to say who it is."""

    link: Link
    hello: Incoming
    until_s: float


def _accept(
    listener: socket.socket, members: Members, mesh: Mesh, deadline_s: float, go_on: Callable[[], None]
) -> None:
    """Take the connections of all higher ranks."""
    awaited = {(rank, channel) for rank in range(members.rank + 1, len(members.addresses)) for channel in Channel}
    visitors: dict[int, _Visitor] = {}
    try:
        while awaited:
            go_on()
            if time.monotonic() >= deadline_s:
                raise PeerFailed(min(awaited)[0], "did not connect in time")
            for number in _readable([listener.fileno(), *visitors]):
                if number == listener.fileno():
                    _greet(listener, members.epoch, visitors)
                elif (who := _ask(visitors[number], members, awaited)) is not None:
                    mesh.links[who] = visitors.pop(number).link
                    awaited.remove(who)
            for number in [n for n, visitor in visitors.items() if _is_turned_away(visitor)]:
                visitors.pop(number).link.close()
    finally:
        for visitor in visitors.values():
            visitor.link.close()


def _readable(numbers: Sequence[int]) -> list[int]:
    poll = select.poll()
    for number in numbers:
        poll.register(number, select.POLLIN)
    return [number for number, _ in poll.poll(1000 * _LOOK_S)]


def _greet(listener: socket.socket, epoch: int, visitors: dict[int, _Visitor]) -> None:
    try:
        connection, _ = listener.accept()
    except OSError:  # gone again, or this process has too many files open
        time.sleep(_RETRY_S)
        return
    link = Link(connection, peer=-1, epoch=epoch)
    hello = Incoming(link=link, kind=Kind.HELLO, payload=None, max_bytes=_HELLO.size)
    visitors[connection.fileno()] = _Visitor(link=link, hello=hello, until_s=time.monotonic() + _HELLO_S)


def _is_turned_away(visitor: _Visitor) -> bool:
    return time.monotonic() >= visitor.until_s


def _ask(visitor: _Visitor, members: Members, awaited: set[tuple[int, Channel]]) -> tuple[int, Channel] | None:
    """Who it is, once it has said so and is awaited; whoever else it is has no time left."""
    with contextlib.suppress(HeterodyneError):
        if not visitor.hello.go_on():
            return None
        who = _who(visitor.hello.payload, members.token)
        if who in awaited:
            visitor.link.peer = who[0]
            send(visitor.link, Kind.WELCOME, memoryview(b""), deadline_s=visitor.until_s)
            return who
    visitor.until_s = 0.0
    return None


def _who(payload: memoryview | None, token: bytes) -> tuple[int, Channel]:
    if payload is None or payload.nbytes != _HELLO.size:
        raise BadFrame("a HELLO has another length")
    said, rank, channel = _HELLO.unpack(payload)
    if not hmac.compare_digest(said, token) or channel not in Channel._value2member_map_:
        raise BadFrame("a HELLO has another token")
    return rank, Channel(channel)
