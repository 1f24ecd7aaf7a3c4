"""The key-value store that the ranks' torch.distributed backends need to find each other, over the links there are.

A store of torch's own would open another port, which no token protects. Here every rank keeps all keys: a rank that
sets one sends it to all others over their links. Nothing is pickled; a value is the bytes that a backend wrote, such as
the address that it listens on.
"""

import select
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed

from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Incoming, Link, send

if TYPE_CHECKING or torch.distributed.is_available():
    from torch._C._distributed_c10d import Store
else:
    Store = object

MAX_BYTES = 1 << 16
"""The largest message: an address for each rank, or the identity of a communicator."""

_CHECK_S = 0.05
_HEAD = struct.Struct("<BH")  # kind of the message, length of the key
_SET, _END = 0, 1


class SetUpFailed(RuntimeError):
    """A rank could not set a backend up, so the ranks go on without it."""


class LinkStore(Store):
    """A torch store shared by the ranks of a group while each of them sets up the same backend.

    One thread uses it, and uses the links alone until :meth:`finish`. Afterwards the store keeps the keys it has.
    """

    def __init__(self, links: Mapping[int, Link], *, deadline_s: float, alive: Callable[[], None]) -> None:
        """``links`` lead to all other ranks, by rank. Every wait ends by ``deadline_s``, or when ``alive`` raises."""
        super().__init__()
        self._links = links
        self._deadline_s = deadline_s
        self._alive = alive
        self._values: dict[str, bytes] = {}
        self._problem = ""
        self._receiving = {rank: _incoming(link) for rank, link in links.items()}  # from ranks that have not ended

    def set(self, key: str, value: str | bytes) -> None:
        """Sets a key at all ranks."""
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)
        self._tell(_SET, key, self._values[key])

    def get(self, key: str) -> bytes:
        """Waits until some rank sets the key and returns its value. Raises PeerFailed and SetUpFailed."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Waits until all ``keys`` are set. Raises PeerFailed and SetUpFailed."""
        while not self.check(keys):
            if self._problem or not self._receiving:
                raise SetUpFailed(self._problem or f"nobody set {[key for key in keys if key not in self._values]}")
            self._listen()

    def check(self, keys: Sequence[str]) -> bool:
        """Tells whether all ``keys`` are known here."""
        return all(key in self._values for key in keys)

    def finish(self, problem: str = "") -> None:
        """Waits until all ranks have finished; afterwards no message of a store is on the links.

        Args:
            problem: why this rank is not set up; empty where it is.

        Raises:
            PeerFailed: a rank was lost.
            SetUpFailed: some rank is not set up, which all of them are told.
        """
        self._tell(_END, "", problem.encode()[: MAX_BYTES // 2])
        while self._receiving:
            self._listen()
        if problem or self._problem:
            raise SetUpFailed(problem or self._problem)

    def _tell(self, kind: int, key: str, value: bytes) -> None:
        """Sends a message to all other ranks."""
        name = key.encode()
        message = memoryview(_HEAD.pack(kind, len(name)) + name + value)
        for link in self._links.values():
            send(link, Kind.TENSOR, message, deadline_s=self._deadline_s, alive=self._alive)

    def _listen(self) -> None:
        """Reads messages that have come, or waits for a moment. Raises PeerFailed and BadFrame."""
        ready = [rank for rank, frame in self._receiving.items() if frame.advance()]
        for rank in ready:
            self._read(rank)
        if ready:
            return
        self._alive()
        if time.monotonic() >= self._deadline_s:
            raise PeerFailed.timed_out(self._links[min(self._receiving)].peer)
        poll = select.poll()
        for rank in self._receiving:
            poll.register(self._links[rank].socket.fileno(), select.POLLIN)
        poll.poll(1000 * _CHECK_S)

    def _read(self, rank: int) -> None:
        """Reads the message of a rank, and expects its next one unless it was the last."""
        payload = self._receiving.pop(rank).payload
        kind, key, value = _parse(payload)
        if kind == _END:  # what comes next on this link is not the store's
            self._problem = self._problem or value.decode(errors="replace")
            return
        self._values[key] = value
        self._receiving[rank] = _incoming(self._links[rank])


def _incoming(link: Link) -> Incoming:
    return Incoming(link=link, kind=Kind.TENSOR, payload=None, max_bytes=MAX_BYTES)


def _parse(payload: memoryview | None) -> tuple[int, str, bytes]:
    """Returns a message's kind, key and value. Raises BadFrame."""
    data = b"" if payload is None else bytes(payload)
    if len(data) < _HEAD.size:
        raise BadFrame(f"a message of a rendezvous has {len(data)} bytes")
    kind, length = _HEAD.unpack_from(data)
    if kind not in (_SET, _END) or _HEAD.size + length > len(data):
        raise BadFrame(f"a message of a rendezvous is of kind {kind}, with a key of {length} of {len(data)} bytes")
    end = _HEAD.size + length
    return kind, data[_HEAD.size : end].decode(errors="replace"), data[end:]
