"""Keeps the transfers that a rank awaits, for the thread that receives and for those that expect and close."""

import contextlib
import threading
from collections import deque
from dataclasses import dataclass, field

from kernels.attention import Run
from placement.errors import InvalidRequest
from placement.model.part import Span
from placement.serving.kv.peers import KvFormat, ReplicaRanks
from placement.serving.kv.portions import PortionLayouts
from workers.kv_transfer.arrivals import Arrivals
from workers.kv_transfer.inbound import Inbound
from workers.kv_transfer.packing import MessagePlaces
from workers.model.kv_cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Keys and values that another replica is to send.

    Attributes:
        transfer_id: names the transfer.
        source: the ranks of the replica that sends.
        tokens: the positions in the sequence that come.
        runs: the slots of all tokens up to the last that comes, of all ranks of this replica, in token order.
        format: how they are written.
    """

    transfer_id: bytes
    source: ReplicaRanks
    tokens: Span
    runs: tuple[Run, ...]
    format: KvFormat


@dataclass(slots=True)
class Awaited:
    """An expected transfer.

    Attributes:
        lock: is held while something of it is written to the cache, which only the receiver's thread does.
        inbound: the connection over which each source rank has begun to send it.
        places: the portion of each source rank that was written last, and where it lies.
        cache: where it is written to, and ``runs``, the slots there of all tokens up to the last that comes.
    """

    expected: Expected
    layouts: PortionLayouts
    arrivals: Arrivals
    cache: KVCache
    runs: tuple[Run, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)
    inbound: dict[int, Inbound] = field(default_factory=dict)
    places: dict[int, tuple[Span, MessagePlaces]] = field(default_factory=dict)


class AwaitedTransfers:
    """Holds the transfers that are awaited, and those that have ended until that was told. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # never held for long, and taken after that of a transfer
        self._awaited: dict[bytes, Awaited] = {}
        self._ends: deque[tuple[bytes, str, int]] = deque()

    def add(self, awaited: Awaited) -> None:
        """Awaits a transfer; one that is complete as it stands ends at once.

        Raises:
            InvalidRequest: a transfer of that name is awaited already.
        """
        transfer_id = awaited.expected.transfer_id
        with self._lock:
            if transfer_id in self._awaited:
                raise InvalidRequest(
                    field="transfer_id",
                    value=transfer_id.hex(),
                    problem="is awaited already",
                    fix="Give each transfer a name of its own.",
                )
            if awaited.arrivals.is_complete:
                self._ends.append((transfer_id, "", 0))
            else:
                self._awaited[transfer_id] = awaited

    def find(self, transfer_id: bytes) -> Awaited | None:
        """Returns the transfer of that name; None where it is unknown, closed or has ended."""
        with self._lock:
            return self._awaited.get(transfer_id)

    def every(self) -> list[Awaited]:
        """Returns all that are awaited."""
        with self._lock:
            return list(self._awaited.values())

    def close(self, transfer_id: bytes) -> None:
        """Forgets a transfer, whose end is not told any more. It waits while something of it is written."""
        awaited = self.find(transfer_id)
        with contextlib.nullcontext() if awaited is None else awaited.lock, self._lock:
            if awaited is not None and self._awaited.get(transfer_id) is awaited:
                del self._awaited[transfer_id]
            self._ends = deque(end for end in self._ends if end[0] != transfer_id)

    def end(self, awaited: Awaited, problem: str) -> None:
        """Ends a transfer, unless it was closed. Nothing of it is written from then on."""
        transfer_id = awaited.expected.transfer_id
        with self._lock:
            if self._awaited.get(transfer_id) is awaited:
                del self._awaited[transfer_id]
                self._ends.append((transfer_id, problem, awaited.arrivals.num_bytes))

    def next_end(self) -> tuple[bytes, str, int] | None:
        """Takes the oldest end that was not told: the transfer, the problem or "", and the bytes that came."""
        with self._lock:
            return self._ends.popleft() if self._ends else None

    def clear(self) -> None:
        """Forgets all that are awaited."""
        with self._lock:
            self._awaited.clear()
