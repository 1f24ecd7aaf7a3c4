"""The model rank's end of a session with an attention worker."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from torch import Tensor

from placement.errors import HeterodyneError, NotEnoughMemory
from placement.serving.offload.orders import Geometry, StepOrder
from workers.attention_worker.errors import AttentionLost, AttentionRefused
from workers.attention_worker.handshake import Refused, introduce
from workers.attention_worker.messages import KV_ROWS, QUERY_ROWS, Hello, pack_order
from workers.attention_worker.rows import AnswerRows, answer_rows
from workers.attention_worker.session import AttentionResult, Welcome, WireCounts
from workers.attention_worker.stream import PULSE_S, Frame, Stream, bytes_of
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link

SILENCE_S = 3.0
"""A worker that owes something and says nothing for so long is lost; while it computes it sends a pulse."""
_TICK_S = 0.25
_RETRY_S = 0.05
_CONNECT_S = 2.0


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(slots=True, kw_only=True, eq=False)
class _UnderWay:
    """An order whose answers are awaited.

    Attributes:
        result: views of the answer's memory.
        next_layer: the layer whose answer comes next.
    """

    rows: AnswerRows
    result: AttentionResult
    next_layer: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Says when a worker is lost.

    Attributes:
        silence_s: how long it may be silent while it owes something.
        alive: is called again and again while it is waited for; what it raises ends the wait.
    """

    silence_s: float = SILENCE_S
    alive: Callable[[], None] = lambda: None


def _in_turn(
    method: Callable[Concatenate["RemoteSession", _Arguments], _Result],
) -> Callable[Concatenate["RemoteSession", _Arguments], _Result]:
    """Lets one thread at a time use a session by the method."""

    @wraps(method)
    def turn(session: "RemoteSession", /, *args: _Arguments.args, **fields: _Arguments.kwargs) -> _Result:
        with session.turn:
            return method(session, *args, **fields)

    return turn


class RemoteSession:
    """A session with an attention worker over TCP: see :class:`workers.attention_worker.session.AttentionSession`."""

    def __init__(
        self,
        link: Link,
        *,
        geometry: Geometry,
        welcome: Welcome,
        worker: int,
        name: str,
        life: Life,
    ) -> None:
        """Takes ownership of a connection over which the session was opened."""
        self.geometry = geometry
        self.welcome = welcome
        self._worker = worker
        self._name = name
        self._silence_s = life.silence_s
        self._alive = life.alive
        self._link = link
        self._stream = Stream(link, self._place)
        self._orders: dict[int, _UnderWay] = {}
        self._next_number = welcome.last_complete + 1
        self._payload_out = 0
        self._payload_in = 0
        self._lost: AttentionLost | None = None
        # Steps use the session, and so does whoever stores keys and values that come from other replicas.
        self.turn = threading.RLock()
        self._stalled_at: int | None = None  # the bytes that had come, as the last pulse said
        self._num_stalled = 0

    @property
    def counts(self) -> WireCounts:
        """Returns what the session has sent and received since it was opened."""
        return WireCounts(
            payload_out=self._payload_out,
            payload_in=self._payload_in,
            frame_out=self._stream.bytes_out - self._payload_out,
            frame_in=self._stream.bytes_in - self._payload_in,
        )

    @_in_turn
    def order(self, order: StepOrder) -> int:
        """Sends an order and returns its number."""
        self._check()
        number = self._next_number
        self._next_number += 1
        if order.spans:
            rows = answer_rows(self.geometry, order)
            result = AttentionResult(whole=rows.whole, parts=rows.parts, mass=rows.mass)
            self._orders[number] = _UnderWay(rows=rows, result=result)
        self._send(Kind.ATTENTION_ORDER, number, 0, 0, memoryview(pack_order(order)))
        return number

    @_in_turn
    def send(self, number: int, layer: int, query: Tensor | None, keys: Tensor | None, values: Tensor | None) -> None:
        """Sends an order's rows of a layer, as far as the socket takes them."""
        self._check()
        queries = () if query is None else (bytes_of(query),)
        stored = () if keys is None or values is None else (bytes_of(keys), bytes_of(values))
        self._payload_out += sum(part.nbytes for part in (*queries, *stored))
        if queries and stored and not self.geometry.q_first:
            self._send(Kind.ATTENTION_ROWS, number, layer, QUERY_ROWS | KV_ROWS, *queries, *stored)
            return
        if queries:
            self._send(Kind.ATTENTION_ROWS, number, layer, QUERY_ROWS, *queries)
        if stored:
            self._send(Kind.ATTENTION_ROWS, number, layer, KV_ROWS, *stored)

    def result(self, number: int, layer: int) -> AttentionResult:
        """Waits for the answer of an order in a layer, while the worker shows signs of life."""
        self._check()
        under_way = self._orders[number]
        assert layer < self.geometry.num_layers, layer
        try:
            self._wait(lambda: under_way.next_layer > layer)
        except (PeerFailed, BadFrame) as error:
            raise self._lose(error) from error
        if under_way.next_layer == self.geometry.num_layers:
            del self._orders[number]
        return under_way.result

    def flush(self) -> None:
        """Sends what is still queued. It reads nothing, so that whoever waits for a result is not kept from it."""
        self._check()
        silent_s = 0.0
        try:
            while not self._has_pushed():
                silent_s = 0.0 if self._stream.wait_for_room(_TICK_S) else silent_s + _TICK_S
                self._check_silence(silent_s)
        except (PeerFailed, BadFrame) as error:
            raise self._lose(error) from error

    @_in_turn
    def _has_pushed(self) -> bool:
        return self._stream.push()

    def close(self) -> None:
        """Closes the connection. Whoever waits in another thread gets AttentionLost."""
        self._link.close()

    def _wait(self, is_done: Callable[[], bool]) -> None:
        """Sends and receives until it is done. Silence is counted in ticks, as this process may be held up, too."""
        silent_s = 0.0
        while True:
            with self.turn:
                silent_s = 0.0 if self._receive() else silent_s
                self._stream.push()
                if is_done():
                    return
            if not self._stream.wait(_TICK_S):
                silent_s += _TICK_S
                self._check_silence(silent_s)

    def _check_silence(self, silent_s: float) -> None:
        if silent_s >= self._silence_s:
            raise PeerFailed(self._worker, f"is frozen or cut off: silent for {self._silence_s:g} s")
        if silent_s:
            self._alive()

    def _receive(self) -> bool:
        """Takes the frames that have come, and returns whether anything has."""
        before = self._stream.progress
        while (frame := self._stream.read()) is not None:
            if frame.kind is Kind.PULSE:
                self._look(frame)
            else:
                self._orders[frame.number].next_layer += 1
                self._payload_in += frame.body.nbytes
        return self._stream.progress != before

    def _look(self, pulse: Frame) -> None:
        """Raises PeerFailed where the worker waits for bytes that were sent long ago, as its pulses say."""
        progress = pulse.number if pulse.rows and self._stream.has_lost(pulse.number) else None
        self._num_stalled = self._num_stalled + 1 if progress is not None and progress == self._stalled_at else 0
        self._stalled_at = progress
        if self._num_stalled * PULSE_S >= self._silence_s:
            raise PeerFailed(self._worker, "does not receive what is sent")

    def _place(self, kind: Kind, number: int, layer: int, rows: int, length: int) -> memoryview:
        """Returns the memory of an answer that is due. Raises BadFrame."""
        under_way = self._orders.get(number)
        if kind is not Kind.ATTENTION_RESULT or under_way is None or under_way.next_layer != layer or rows:
            raise BadFrame(f"a {kind.name} frame of order {number} and layer {layer} is not due")
        return under_way.rows.memory

    def _send(self, kind: Kind, number: int, layer: int, rows: int, *parts: memoryview) -> None:
        try:
            self._stream.push()
            self._stream.send(kind, number, layer, rows, *parts)
        except (PeerFailed, BadFrame) as error:
            raise self._lose(self._last_words(error)) from error

    def _last_words(self, error: HeterodyneError) -> HeterodyneError:
        """Returns why the worker ended the session, where it said so."""
        try:
            while self._stream.read() is not None:
                pass
        except (PeerFailed, BadFrame) as said:
            return said
        return error

    def _lose(self, error: HeterodyneError) -> AttentionLost:
        cause = error.cause if isinstance(error, PeerFailed) else str(error)
        with self.turn:
            if self._lost is None:  # what another thread finds after that is that the connection was closed here
                self._lost = AttentionLost(self._worker, self._name, cause)
        self._link.close()
        return AttentionLost(self._worker, self._name, self._lost.cause)

    def _check(self) -> None:
        if self._lost is not None:
            raise AttentionLost(self._worker, self._name, self._lost.cause)


def connect(
    address: tuple[str, int],
    *,
    name: str,
    worker: int,
    epoch: int,
    secret: bytes,
    replica: str,
    rank: int,
    geometry: Geometry,
    resumes: bool,
    deadline_s: float,
    life: Life | None = None,
) -> RemoteSession:
    """Opens a session of a rank of a replica with an attention worker, whose index there is ``worker``.

    Args:
        epoch: is greater than that of any session of this rank before.
        resumes: whether keys, values and names of the session before are to be kept.
        deadline_s: the end of the wait on the clock of :func:`time.monotonic`.
        life: says when the worker is lost.

    Raises:
        NotEnoughMemory: the worker has not the memory.
        AttentionRefused: it does not know the secret, or knows a session of the same or a greater epoch.
        AttentionLost: it was not reached by the deadline, or is not what it should be.
    """
    life, alive = life or Life(), (life or Life()).alive
    hello = Hello(replica=replica, rank=rank, epoch=epoch, resumes=resumes, geometry=geometry)
    try:
        link = _reach(address, worker, deadline_s, alive)
        with ExitStack() as undo:
            undo.callback(link.close)
            welcome = introduce(link, hello, secret, deadline_s=deadline_s, alive=alive)
            undo.pop_all()
    except (Refused, PeerFailed, BadFrame) as error:
        raise _not_opened(error, worker, name) from error
    link.epoch = epoch
    return RemoteSession(link, geometry=geometry, welcome=welcome, worker=worker, name=name, life=life)


def _not_opened(error: HeterodyneError, worker: int, name: str) -> HeterodyneError:
    """Returns the error of a session that was not opened."""
    if isinstance(error, Refused) and error.is_full:
        fix = "Lower serving.attention.kv_cache, or give its worker more memory."
        return NotEnoughMemory(field=f"attention worker {name}", problem=str(error), fix=fix)
    if isinstance(error, Refused):
        return AttentionRefused(worker, name, str(error))
    return AttentionLost(worker, name, error.cause if isinstance(error, PeerFailed) else str(error))


def _reach(address: tuple[str, int], worker: int, deadline_s: float, alive: Callable[[], None]) -> Link:
    """Connects to a worker, which may not be there yet. Raises PeerFailed, and what ``alive`` does."""
    host, port = address
    while (left_s := deadline_s - time.monotonic()) > 0:
        alive()
        try:
            sock = socket.create_connection((host, port), timeout=min(left_s, _CONNECT_S))
        except OSError:  # not there yet, or the network is not
            time.sleep(_RETRY_S)
            continue
        return Link(sock, peer=worker, epoch=0)
    raise PeerFailed(worker, f"could not be reached at {host}:{port} from {socket.gethostname()}")
