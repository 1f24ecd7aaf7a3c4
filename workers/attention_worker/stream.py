"""Moves the frames of a session over its connection, without ever waiting for the other end to read."""

import select
import threading
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.attention_worker.messages import TAG
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import HEADER_BYTES, Header, Kind, header, parse
from workers.transport.link import Link, broken

HEAD_BYTES = HEADER_BYTES + TAG.size
"""Bytes of a frame besides its rows, or its order."""
PULSE_S = 0.5
"""How often a worker that owes something shows that it lives."""
_BITS = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that has come: its kind, its tag, and its rows or order."""

    kind: Kind
    number: int
    layer: int
    rows: int
    body: memoryview


Place = Callable[[Kind, int, int, int, int], memoryview]
"""Returns memory for a frame's body, by its kind, number, layer, rows and length. Raises BadFrame if it is not due."""


class Stream:
    """Sends and receives the frames of a session. One thread receives; any may send.

    Attributes:
        bytes_out: bytes that were sent, or are queued.
        bytes_in: bytes of all frames that have come.
        progress: bytes that have come, of frames that are not whole as well.
        is_waiting: whether a thread waits until it can send or receive.
    """

    def __init__(self, link: Link, place: Place) -> None:
        """Frames that come are received into the memory that ``place`` returns."""
        self.link = link
        self.bytes_out = 0
        self.bytes_in = 0
        self.progress = 0
        self.is_waiting = False
        self._place = place
        self._lock = threading.Lock()  # guards what is sent
        self._queue: deque[memoryview] = deque()
        self._head = memoryview(bytearray(HEAD_BYTES))
        self._header: Header | None = None
        self._tag = (0, 0, 0)
        self._body = memoryview(b"")
        self._filled = 0
        self._poll = select.poll()
        self._poll.register(link.socket.fileno(), select.POLLIN)
        self._awaits_room = False

    def send(self, kind: Kind, number: int, layer: int, rows: int, *parts: memoryview) -> None:
        """Sends a frame as far as the socket takes it; what is left is copied and queued. Raises PeerFailed."""
        tag = TAG.pack(number, layer, rows)
        with self._lock:
            self._send(kind, tag, parts)

    def beat(self) -> None:
        """Sends a pulse, unless something else is on its way. Raises PeerFailed.

        It says how many bytes have come, and whether this end waits for more: so the other end sees what was lost.
        """
        with self._lock:
            if not self._queue:
                self._send(Kind.PULSE, TAG.pack(self.progress & _BITS, 0, self.is_waiting), ())

    def push(self) -> bool:
        """Sends what the socket takes of what is queued, and returns whether nothing is left. Raises PeerFailed."""
        if not self._queue:
            return True
        with self._lock:
            while self._queue:
                first = self._queue[0]
                sent = self._write([first])
                if sent < first.nbytes:
                    self._queue[0] = first[sent:]
                    return False
                self._queue.popleft()
        return True

    def read(self) -> Frame | None:
        """Receives what has come; returns the next frame once it is whole. Raises PeerFailed and BadFrame."""
        if self._header is None:
            if not self._fill(self._head):
                return None
            self._begin()
        assert self._header is not None
        if not self._fill(self._body):
            return None
        crc = zlib.crc32(self._body, zlib.crc32(self._head[HEADER_BYTES:], zlib.crc32(self._header.fields)))
        if crc != self._header.checksum:
            raise BadFrame(f"a {self._header.kind.name} frame of {self._header.length} bytes is damaged (checksum)")
        kind, self._header, self._filled = self._header.kind, None, 0
        self.link.num_received += 1
        self.bytes_in += HEAD_BYTES + self._body.nbytes
        if kind is Kind.FAILED:
            raise PeerFailed(self.link.peer, bytes(self._body).decode(errors="replace"))
        return Frame(kind, *self._tag, self._body)

    def wait(self, timeout_s: float) -> bool:
        """Waits until something can be received, or sent where something is queued; returns whether it can."""
        if self.link.socket.fileno() < 0:
            raise PeerFailed.ended_here(self.link.peer)
        awaits_room = bool(self._queue)
        if awaits_room != self._awaits_room:
            self._poll.modify(self.link.socket.fileno(), select.POLLIN | (select.POLLOUT if awaits_room else 0))
            self._awaits_room = awaits_room
        self.is_waiting = True
        ready = bool(self._poll.poll(1000 * timeout_s))
        self.is_waiting = False
        return ready

    def has_lost(self, progress: int) -> bool:
        """Tells whether all was handed to the socket, and yet a pulse says that less has come."""
        return not self._queue and progress != self.bytes_out & _BITS

    def wait_for_room(self, timeout_s: float) -> bool:
        """Waits until something can be sent; returns whether it can."""
        number = self.link.socket.fileno()
        if number < 0:
            raise PeerFailed.ended_here(self.link.peer)
        poll = select.poll()
        poll.register(number, select.POLLOUT)
        return bool(poll.poll(1000 * timeout_s))

    def _begin(self) -> None:
        """Reads a header, and finds memory for what follows."""
        parsed = parse(self._head, epoch=self.link.epoch, number=self.link.num_received)
        self._tag = TAG.unpack_from(self._head, HEADER_BYTES)
        length = parsed.length - TAG.size
        if length < 0:
            raise BadFrame(f"a {parsed.kind.name} frame has {parsed.length} bytes, too few for its tag")
        if parsed.kind in (Kind.FAILED, Kind.PULSE):
            if length > 1000:
                raise BadFrame(f"a {parsed.kind.name} frame has {length} bytes")
            self._body = memoryview(bytearray(length))
        else:
            self._body = self._place(parsed.kind, *self._tag, length)
        if self._body.nbytes != length:
            raise BadFrame(f"a {parsed.kind.name} frame has {length} bytes, not {self._body.nbytes}")
        self._header, self._filled = parsed, 0

    def _fill(self, memory: memoryview) -> bool:
        """Receives what has come into ``memory``, and returns whether it is full."""
        size = memory.nbytes
        while self._filled < size:
            try:
                count = self.link.socket.recv_into(memory[self._filled :] if self._filled else memory)
            except BlockingIOError:
                return False
            except OSError as error:
                raise broken(self.link, error) from error
            if not count:
                raise PeerFailed.closed(self.link.peer)
            self._filled += count
            self.progress += count
        return True

    def _send(self, kind: Kind, tag: bytes, parts: tuple[memoryview, ...]) -> None:
        head = header(kind, memoryview(tag), *parts, epoch=self.link.epoch, number=self.link.num_sent) + tag
        self.link.num_sent += 1
        pieces = [memoryview(head), *parts]
        self.bytes_out += sum(piece.nbytes for piece in pieces)
        sent = 0 if self._queue else self._write(pieces)
        for piece in pieces:
            if sent >= piece.nbytes:
                sent -= piece.nbytes
                continue
            self._queue.append(memoryview(bytes(piece[sent:])))
            sent = 0

    def _write(self, pieces: list[memoryview]) -> int:
        try:
            return self.link.socket.sendmsg(pieces)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise broken(self.link, error) from error


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns a tensor's bytes, row after row; they are the tensor's own where that lies so on the CPU."""
    memory: memoryview = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return memory
