"""How a session begins: both sides prove that they know the secret, and neither says it.

The worker sends a challenge, the model rank answers with a challenge of its own and the HMAC (SHA-256) of both and of
what it asks for; the worker's answer proves itself in the same way. Nothing is read of what is not proved.
"""

import hmac
import secrets
import socket
from collections.abc import Callable, Mapping

from placement.errors import HeterodyneError
from workers.attention_worker.messages import Hello, pack_hello, pack_welcome, unpack_hello, unpack_welcome
from workers.attention_worker.session import Welcome
from workers.transport.errors import BadFrame
from workers.transport.frames import Kind
from workers.transport.link import Incoming, Link, complete, receive, send

CHALLENGE_BYTES = 32
_PROOF_BYTES = 32
_MOST_HELLO_BYTES = 1 << 20
_MOST_WELCOME_BYTES = 1 << 30
FULL, OTHER = b"m", b"r"
"""Why a worker refuses: it has not the memory, or anything else."""

Alive = Callable[[], None]


class Refused(HeterodyneError):
    """The worker does not take the session.

    Attributes:
        is_full: whether it lacks the memory.
    """

    def __init__(self, cause: str, *, is_full: bool = False) -> None:
        self.is_full = is_full
        super().__init__(cause)


def challenge(sock: socket.socket, *, deadline_s: float, alive: Alive = lambda: None) -> tuple[Link, bytes]:
    """Sends a visitor the challenge of the worker. Raises PeerFailed."""
    link = Link(sock, peer=0, epoch=0)
    own = secrets.token_bytes(CHALLENGE_BYTES)
    send(link, Kind.ATTENTION_CHALLENGE, memoryview(own), deadline_s=deadline_s, alive=alive)
    return link, own


def hear(
    link: Link, own: bytes, secret: bytes, *, deadline_s: float, alive: Alive = lambda: None
) -> tuple[Hello, bytes]:
    """Returns what a visitor asks for, and its challenge. Raises Refused, BadFrame and PeerFailed."""
    data = receive(link, Kind.ATTENTION_HELLO, deadline_s=deadline_s, alive=alive, max_bytes=_MOST_HELLO_BYTES)
    proof, theirs = bytes(data[:_PROOF_BYTES]), bytes(data[_PROOF_BYTES : _PROOF_BYTES + CHALLENGE_BYTES])
    body = data[_PROOF_BYTES + CHALLENGE_BYTES :]
    if not hmac.compare_digest(proof, _proof(secret, b"hello", own, theirs, bytes(body))):
        raise Refused("it does not know the secret of this deployment")
    return unpack_hello(body), theirs


def welcome(
    link: Link,
    theirs: bytes,
    secret: bytes,
    *,
    resumed: bool,
    last_complete: int,
    names: Mapping[int, tuple[bytes, int]],
    deadline_s: float,
) -> None:
    """Takes the session, and says what is still there. Raises PeerFailed."""
    body = pack_welcome(resumed=resumed, last_complete=last_complete, names=names)
    data = _proof(secret, b"welcome", theirs, body) + body
    send(link, Kind.ATTENTION_WELCOME, memoryview(data), deadline_s=deadline_s)


def refuse(link: Link, refused: Refused, *, deadline_s: float) -> None:
    """Tells a visitor why it is refused. Raises PeerFailed."""
    data = (FULL if refused.is_full else OTHER) + str(refused).encode()[:1000]
    send(link, Kind.ATTENTION_REFUSED, memoryview(data), deadline_s=deadline_s)


def introduce(link: Link, hello: Hello, secret: bytes, *, deadline_s: float, alive: Alive) -> Welcome:
    """Opens a session over a new connection. Raises Refused, BadFrame and PeerFailed."""
    theirs = receive(link, Kind.ATTENTION_CHALLENGE, deadline_s=deadline_s, alive=alive, max_bytes=CHALLENGE_BYTES)
    own, body = secrets.token_bytes(CHALLENGE_BYTES), pack_hello(hello)
    proof = _proof(secret, b"hello", bytes(theirs), own, body)
    said = memoryview(proof + own + body)
    send(link, Kind.ATTENTION_HELLO, said, deadline_s=deadline_s, alive=alive)
    answer = Incoming(
        link=link,
        kind=Kind.ATTENTION_WELCOME,
        payload=None,
        max_bytes=_MOST_WELCOME_BYTES,
        also=frozenset({Kind.ATTENTION_REFUSED}),
    )
    complete([], [answer], deadline_s=deadline_s, alive=alive)
    assert answer.payload is not None
    if answer.kind is Kind.ATTENTION_REFUSED:
        code, cause = bytes(answer.payload[:1]), bytes(answer.payload[1:]).decode(errors="replace")
        raise Refused(cause, is_full=code == FULL)
    proof, data = bytes(answer.payload[:_PROOF_BYTES]), answer.payload[_PROOF_BYTES:]
    if not hmac.compare_digest(proof, _proof(secret, b"welcome", own, bytes(data))):
        raise BadFrame("it does not know the secret of this deployment")
    resumed, last_complete, names = unpack_welcome(data)
    return Welcome(resumed=resumed, last_complete=last_complete, names=names)


def _proof(secret: bytes, *parts: bytes) -> bytes:
    digest = hmac.new(secret, digestmod="sha256")
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
