"""Serves one session at the attention worker, on a thread of its own: takes frames in turn, computes, answers."""

import logging
import socket
import threading
import time
from contextlib import suppress

from kernels.protocol import Kernels
from placement.errors import HeterodyneError, cause_of
from protos.codec.log_record import said
from workers.attention_worker.attending import Attending
from workers.attention_worker.memory import HeldMemory
from workers.attention_worker.messages import unpack_order
from workers.attention_worker.stream import Frame, Stream
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link

logger = logging.getLogger(__name__)

_CHECK_S = 0.5
_MOST_ORDER_BYTES = 256 << 20
_MOST_ORDERS = 64


class ServedSession:
    """The worker's end of a session.

    Attributes:
        ended: is set once its thread no longer touches the memory.
    """

    def __init__(self, link: Link, memory: HeldMemory, kernels: Kernels) -> None:
        """Takes ownership of a connection over which the session was opened."""
        self.ended = threading.Event()
        self._link = link
        self._memory = memory
        self._kernels = kernels
        self._stream = Stream(link, self._place)
        self._orders: dict[int, Attending] = {}
        self._next_number = memory.last_complete + 1
        self._stopped = False

    def run(self) -> None:
        """Serves until the connection ends, whatever happens; what is held stays."""
        try:
            self._serve()
        except PeerFailed as error:
            logger.debug("A session ended: %s.", error.cause, extra=said("attention_session_ended", cause=error.cause))
        except Exception as error:  # the border of the thread
            if not isinstance(error, HeterodyneError):
                logger.exception("A session failed.", extra=said("attention_session_failed"))
            with suppress(HeterodyneError):
                self._stream.send(Kind.FAILED, 0, 0, 0, memoryview(cause_of(error).encode()[:900]))
        finally:
            self._memory.used_s = time.monotonic()
            self._link.close()
            self.ended.set()

    def beat(self) -> None:
        """Shows the model rank that this worker lives, while it owes something."""
        if self._orders and not self.ended.is_set():
            with suppress(PeerFailed):  # its own thread finds out
                self._stream.beat()

    def stop(self) -> None:
        """Ends the connection, which ends the thread once it has computed what it is at."""
        self._stopped = True
        with suppress(OSError):  # it is no longer connected
            self._link.socket.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        stream = self._stream
        while not self._stopped:
            frame = stream.read()
            if frame is not None:
                self._take(frame)
            else:
                stream.push()
                stream.wait(_CHECK_S)

    def _place(self, kind: Kind, number: int, layer: int, rows: int, length: int) -> memoryview:
        """Returns memory for a frame. Raises BadFrame where it is not due."""
        if kind is Kind.ATTENTION_ORDER:
            if number != self._next_number or length > _MOST_ORDER_BYTES or len(self._orders) >= _MOST_ORDERS:
                raise BadFrame(f"order {number} of {length} bytes came where {self._next_number} was due")
            return memoryview(bytearray(length))
        attending = self._orders.get(number)
        if kind is not Kind.ATTENTION_ROWS or attending is None:
            raise BadFrame(f"a {kind.name} frame of order {number} is not due")
        return attending.memory_of(layer, rows)

    def _take(self, frame: Frame) -> None:
        if frame.kind is Kind.ATTENTION_ORDER:
            self._begin(frame)
        elif frame.kind is Kind.ATTENTION_ROWS:
            attending = self._orders[frame.number]
            answer = attending.take(frame.rows)
            if answer is not None:
                self._stream.send(Kind.ATTENTION_RESULT, frame.number, frame.layer, 0, answer)
            self._retire(attending)

    def _begin(self, frame: Frame) -> None:
        order = unpack_order(frame.body)
        self._memory.begin(order, frame.number)
        attending = Attending(frame.number, order, self._memory, self._kernels)
        self._next_number += 1
        self._orders[frame.number] = attending
        self._retire(attending)

    def _retire(self, attending: Attending) -> None:
        if attending.is_complete:
            del self._orders[attending.number]
            self._memory.complete(attending.number)
