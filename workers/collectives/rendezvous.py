"""Where torch.distributed's backends leave what their ranks must know of each other, over connections there are.

A store of torch's own would be another open port, that no token keeps. Here every rank keeps all that anyone sets: who
sets something tells all others, over their links, in frames of bytes. Nothing is pickled: a value is what a backend
wrote, such as the address that it listens on.
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
"""Of a message: an address for each rank, or the identity of a communicator."""

_LOOK_S = 0.05
_HEAD = struct.Struct("<BH")  # whether it is the last, length of the key
_SET, _END = 0, 1


class SetUpFailed(RuntimeError):
    """A rank could not set a backend up, and the ranks go on without it."""


class LinkStore(Store):
    """What the ranks of a group tell each other while each of them sets the same backend up.

    For one thread, which alone uses the links until :meth:`finish`. Afterwards it knows what it knew then.
    """

    def __init__(self, links: Mapping[int, Link], *, deadline_s: float, alive: Callable[[], None]) -> None:
        """Of links to all others, by rank; every wait ends by ``deadline_s``, or when ``alive`` raises."""
        super().__init__()
        self._links = links
        self._deadline_s = deadline_s
        self._alive = alive
        self._kept: dict[str, bytes] = {}
        self._problem = ""
        self._coming = {rank: _incoming(link) for rank, link in links.items()}  # of those that have not ended

    def set(self, key: str, value: str | bytes) -> None:
        """Tells all ranks."""
        self._kept[key] = value.encode() if isinstance(value, str) else bytes(value)
        self._tell(_SET, key, self._kept[key])

    def get(self, key: str) -> bytes:
        """What somebody sets, once that is known. Raises PeerFailed and SetUpFailed."""
        self.wait([key])
        return self._kept[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until all ``keys`` are set. Raises PeerFailed and SetUpFailed."""
        while not self.check(keys):
            if self._problem or not self._coming:
                raise SetUpFailed(self._problem or f"nobody set {[key for key in keys if key not in self._kept]}")
            self._listen()

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all ``keys`` are known here."""
        return all(key in self._kept for key in keys)

    def finish(self, problem: str = "") -> None:
        """Waits until all ranks are set up: nothing is on the links afterwards.

        Args:
            problem: why this one is not, if so.

        Raises:
            PeerFailed: a rank was lost.
            SetUpFailed: a rank is not set up: all of them hear of it.
        """
        self._tell(_END, "", problem.encode()[: MAX_BYTES // 2])
        while self._coming:
            self._listen()
        if problem or self._problem:
            raise SetUpFailed(problem or self._problem)

    def _tell(self, what: int, key: str, value: bytes) -> None:
        name = key.encode()
        message = memoryview(_HEAD.pack(what, len(name)) + name + value)
        for link in self._links.values():
            send(link, Kind.TENSOR, message, deadline_s=self._deadline_s, alive=self._alive)

    def _listen(self) -> None:
        """Takes what has come, or waits for a moment. Raises PeerFailed."""
        ready = [rank for rank, coming in self._coming.items() if coming.go_on()]
        for rank in ready:
            self._take(rank)
        if ready:
            return
        self._alive()
        if time.monotonic() >= self._deadline_s:
            raise PeerFailed(self._links[min(self._coming)].peer, "did not answer in time")
        poll = select.poll()
        for rank in self._coming:
            poll.register(self._links[rank].socket.fileno(), select.POLLIN)
        poll.poll(1000 * _LOOK_S)

    def _take(self, rank: int) -> None:
        payload = self._coming.pop(rank).payload
        what, key, value = _parse(payload)
        if what == _END:  # what comes next is for others
            self._problem = self._problem or value.decode(errors="replace")
            return
        self._kept[key] = value
        self._coming[rank] = _incoming(self._links[rank])


def _incoming(link: Link) -> Incoming:
    return Incoming(link=link, kind=Kind.TENSOR, payload=None, max_bytes=MAX_BYTES)


def _parse(payload: memoryview | None) -> tuple[int, str, bytes]:
    """What it is, the key and the value. Raises BadFrame."""
    data = b"" if payload is None else bytes(payload)
    if len(data) < _HEAD.size:
        raise BadFrame(f"a message of a rendezvous has {len(data)} bytes")
    what, length = _HEAD.unpack_from(data)
    if what not in (_SET, _END) or _HEAD.size + length > len(data):
        raise BadFrame(f"a message of a rendezvous is of kind {what}, with a key of {length} of {len(data)} bytes")
    end = _HEAD.size + length
    return what, data[_HEAD.size : end].decode(errors="replace"), data[end:]
