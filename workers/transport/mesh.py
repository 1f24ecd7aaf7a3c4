"""Connects each rank of a replica with every other, over one connection for each channel.

A rank listens from its start. The controller tells all ranks where the others listen and gives them a token that only
they know. Of two ranks the higher one connects. A visitor that does not present the token, the epoch and the number of
a rank that is still missing is turned away, and holds up nobody.
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
# A rank listens before it is told of, and its kernel takes connections for it: who gets none by then is kept out.
_REACH_S = 6.0
_CHECK_S = 0.1
# A visitor that connects and sends nothing is turned away after this time.
_HELLO_S = 2.0
_FIX = "let all TCP ports pass between the machines (a firewall?), or set cluster.bind_host to an address they reach"


class Channel(IntEnum):
    """The purpose of a connection between two ranks. Each direction is used by one thread at a time."""

    PULSE = 0
    STEPS = 1
    COMPUTE = 2
    STAGES = 3
    KV = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The ranks of a replica, as one of them knows them.

    Attributes:
        rank: the number of this rank.
        addresses: where each rank listens, as (host, port).
        epoch: the incarnation number of the replica.
        token: the secret of the replica, ``TOKEN_BYTES`` long.
    """

    rank: int
    addresses: Sequence[tuple[str, int]]
    epoch: int
    token: bytes

    def __post_init__(self) -> None:
        assert len(self.token) == TOKEN_BYTES and 0 <= self.rank < len(self.addresses), self.rank

    def hello(self, channel: Channel) -> memoryview:
        """Returns the payload of the HELLO frame that this rank sends when it connects."""
        return memoryview(_HELLO.pack(self.token, self.rank, channel))


@dataclass(frozen=True, slots=True)
class Mesh:
    """The connections of one rank to all others, by rank and channel."""

    links: dict[tuple[int, Channel], Link] = field(default_factory=dict)

    def of(self, channel: Channel) -> dict[int, Link]:
        """Returns the links of a channel, by rank."""
        return {rank: link for (rank, used_for), link in self.links.items() if used_for is channel}

    def close(self) -> None:
        """Closes all connections."""
        for link in self.links.values():
            link.close()


def listen(host: str) -> socket.socket:
    """Opens a socket that listens on a free port of ``host``. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def join(
    listener: socket.socket, members: Members, *, deadline_s: float, alive: Callable[[], None] = lambda: None
) -> Mesh:
    """Connects this rank with all others.

    Args:
        listener: the socket from :func:`listen`, which stays open.
        deadline_s: the end of the wait on the clock of :func:`time.monotonic`.
        alive: is called again and again during the wait; what it raises ends the attempt.

    Raises:
        PeerFailed: a rank was not there by the deadline, or did not accept the connection.
    """
    mesh = Mesh()
    try:
        for peer in range(members.rank):
            for channel in Channel:
                mesh.links[peer, channel] = _connect(members, peer, channel, deadline_s, alive)
        _accept(listener, members, mesh, deadline_s, alive)
    except BaseException:
        mesh.close()
        raise
    return mesh


def _connect(members: Members, peer: int, channel: Channel, deadline_s: float, alive: Callable[[], None]) -> Link:
    """Connects to a lower rank, and waits until it takes the connection. Raises PeerFailed, and what ``alive`` does."""
    host, port = members.addresses[peer]
    reach_s = min(deadline_s, time.monotonic() + _REACH_S)
    while True:
        alive()
        left_s = reach_s - time.monotonic()
        if left_s <= 0:
            raise PeerFailed(peer, f"could not be reached at {host}:{port} from {socket.gethostname()}: {_FIX}")
        try:
            link = Link(
                socket.create_connection((host, port), timeout=min(left_s, _CONNECT_S)), peer=peer, epoch=members.epoch
            )
            break
        except OSError:  # not there yet, or the network is not
            time.sleep(_RETRY_S)
    try:
        send(link, Kind.HELLO, members.hello(channel), deadline_s=deadline_s, alive=alive)
        receive(link, Kind.WELCOME, deadline_s=deadline_s, alive=alive, max_bytes=0)
    except (PeerFailed, BadFrame) as error:
        link.close()
        asked = "is the same version of heterodyne installed there?"
        raise PeerFailed(peer, f"did not take the connection: {error} ({asked})") from error
    except BaseException:  # what ``alive`` raises
        link.close()
        raise
    return link


@dataclass(slots=True)
class _Visitor:
    """A connection whose other end has yet to say which rank it is."""

    link: Link
    hello: Incoming
    deadline_s: float


def _accept(
    listener: socket.socket, members: Members, mesh: Mesh, deadline_s: float, alive: Callable[[], None]
) -> None:
    """Accepts the connections of all higher ranks."""
    awaited = {(rank, channel) for rank in range(members.rank + 1, len(members.addresses)) for channel in Channel}
    visitors: dict[int, _Visitor] = {}
    try:
        while awaited:
            alive()
            if time.monotonic() >= deadline_s:
                raise PeerFailed(min(awaited)[0], "did not connect in time")
            for number in _readable([listener.fileno(), *visitors]):
                if number == listener.fileno():
                    _accept_visitor(listener, members.epoch, visitors)
                elif (key := _identify(visitors[number], members, awaited)) is not None:
                    mesh.links[key] = visitors.pop(number).link
                    awaited.remove(key)
            for number in [n for n, visitor in visitors.items() if _is_turned_away(visitor)]:
                visitors.pop(number).link.close()
    finally:
        for visitor in visitors.values():
            visitor.link.close()


def _readable(numbers: Sequence[int]) -> list[int]:
    poll = select.poll()
    for number in numbers:
        poll.register(number, select.POLLIN)
    return [number for number, _ in poll.poll(1000 * _CHECK_S)]


def _accept_visitor(listener: socket.socket, epoch: int, visitors: dict[int, _Visitor]) -> None:
    try:
        connection, _ = listener.accept()
    except OSError:  # the visitor has left, or this process has too many files open
        time.sleep(_RETRY_S)
        return
    link = Link(connection, peer=-1, epoch=epoch)
    hello = Incoming(link=link, kind=Kind.HELLO, payload=None, max_bytes=_HELLO.size)
    visitors[connection.fileno()] = _Visitor(link=link, hello=hello, deadline_s=time.monotonic() + _HELLO_S)


def _is_turned_away(visitor: _Visitor) -> bool:
    return time.monotonic() >= visitor.deadline_s


def _identify(visitor: _Visitor, members: Members, awaited: set[tuple[int, Channel]]) -> tuple[int, Channel] | None:
    """Returns the rank and channel of a visitor, or None while its HELLO is not whole.

    A visitor that is not awaited gets a deadline that is over, so that it is turned away.
    """
    with contextlib.suppress(HeterodyneError):
        if not visitor.hello.advance():
            return None
        key = _read_hello(visitor.hello.payload, members.token)
        if key in awaited:
            visitor.link.peer = key[0]
            send(visitor.link, Kind.WELCOME, memoryview(b""), deadline_s=visitor.deadline_s)
            return key
    visitor.deadline_s = 0.0
    return None


def _read_hello(payload: memoryview | None, token: bytes) -> tuple[int, Channel]:
    if payload is None or payload.nbytes != _HELLO.size:
        raise BadFrame("a HELLO has another length")
    presented, rank, channel = _HELLO.unpack(payload)
    if not hmac.compare_digest(presented, token) or channel not in Channel._value2member_map_:
        raise BadFrame("a HELLO has another token")
    return rank, Channel(channel)
