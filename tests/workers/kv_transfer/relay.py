"""A relay between a source rank and a target rank, which does harm to one frame on the way."""

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable

from workers.transport.frames import HEADER_BYTES

Harm = Callable[[int, bytes], list[bytes]]
"""What becomes of the frame with a number: the frames that are sent in its place."""

_LENGTH = struct.Struct("<Q")
_LENGTH_AT = HEADER_BYTES - 4 - 8


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionResetError
        data += more
    return data


def read_frame(sock: socket.socket) -> bytes:
    head = read_exactly(sock, HEADER_BYTES)
    return head + read_exactly(sock, _LENGTH.unpack_from(head, _LENGTH_AT)[0])


class Relay:
    """Passes frames on to ``target``. The first connection is harmed, and ends once ``num_frames`` have come."""

    def __init__(self, target: tuple[str, int], harm: Harm, num_frames: int) -> None:
        self._target = target
        self._harm = harm
        self._num_frames = num_frames
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.num_connections = 0
        self.frames: list[bytes] = []
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                self.num_connections += 1
                is_first = self.num_connections == 1
                self._threads.append(threading.Thread(target=self._pass, args=(near, far, is_first)))
                self._threads[-1].start()

    def _pass(self, near: socket.socket, far: socket.socket, is_first: bool) -> None:
        number = 0
        with contextlib.suppress(OSError):
            while not (is_first and number == self._num_frames):
                for sock in select.select([near, far], [], [])[0]:
                    if sock is far:
                        data = far.recv(1 << 16)
                        if not data:
                            raise ConnectionResetError
                        near.sendall(data)
                        continue
                    frame = read_frame(near)
                    if is_first:
                        self.frames.append(frame)
                    for out in self._harm(number, frame) if is_first else [frame]:
                        far.sendall(out)
                    number += 1
        for sock in (near, far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for sock in self._sockets:
            sock.close()
