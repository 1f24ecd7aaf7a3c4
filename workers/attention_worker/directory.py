"""Decides who may have a session, and knows what is held for whom.

Each rank of each replica has one session at most. A greater epoch takes over from a smaller one, and fences it. What is
held outlives the connection, until another session takes it or drops it, or its lease ends.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from placement.errors import cause_of
from workers.attention_worker.handshake import Refused
from workers.attention_worker.memory import HeldMemory, allocate, kv_bytes_of
from workers.attention_worker.messages import Hello
from workers.attention_worker.serving import ServedSession
from workers.host.device import is_out_of_memory

LEASE_S = 600.0
"""How long keys and values are held for a model rank whose connection has ended."""
_END_S = 10.0


@dataclass(slots=True, eq=False)
class _Entry:
    """What is known of one model rank. The epoch is remembered for good, so that it stays fenced."""

    epoch: int
    memory: HeldMemory | None = None
    session: ServedSession | None = None


class Directory:
    """What an attention worker holds, by replica and rank. Any thread may use it."""

    def __init__(self, *, kv_cache_bytes: int, device: torch.device, lease_s: float = LEASE_S) -> None:
        """Holds ``kv_cache_bytes`` of keys and values at most."""
        self._most_bytes = kv_cache_bytes
        self._device = device
        self._lease_s = lease_s
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Counts the bytes that are set aside for sessions."""
        memories = [entry.memory for entry in list(self._entries.values())]
        return sum(kv_bytes_of(memory.geometry) for memory in memories if memory is not None)

    @property
    def sessions(self) -> list[ServedSession]:
        """Lists the sessions that are open."""
        found = [entry.session for entry in list(self._entries.values())]
        return [session for session in found if session is not None and not session.ended.is_set()]

    def admit(self, hello: Hello, open_session: Callable[[HeldMemory, bool], ServedSession]) -> ServedSession:
        """Gives a model rank its memory, and the session that ``open_session`` makes of it.

        Args:
            open_session: is given the memory, and whether it is still that of before.

        Raises:
            Refused: the epoch is fenced, or there is not the memory.
        """
        with self._lock:
            entry = self._entries.get((hello.replica, hello.rank))
            if entry is not None and hello.epoch <= entry.epoch:
                raise Refused(f"epoch {hello.epoch} is fenced: it has had a session of epoch {entry.epoch}")
            if entry is None:
                entry = _Entry(hello.epoch)
            else:
                self._end(entry)
            memory, resumed = self._memory(entry, hello)
            entry.epoch, entry.memory = hello.epoch, memory
            self._entries[hello.replica, hello.rank] = entry
            entry.session = open_session(memory, resumed)
            return entry.session

    def let_go(self) -> None:
        """Drops what was held for model ranks that have not come back for the time of the lease.

        It never waits: while a session is being opened nothing is dropped. Its caller shows all others signs of life.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            for entry in self._entries.values():
                is_open = entry.session is not None and not entry.session.ended.is_set()
                if entry.memory is None or is_open:
                    continue
                if time.monotonic() >= entry.memory.used_s + self._lease_s:
                    entry.memory = entry.session = None
        finally:
            self._lock.release()

    def _end(self, entry: _Entry) -> None:
        """Ends the session of a smaller epoch, whose thread no longer touches the memory then. Raises Refused."""
        if entry.session is None:
            return
        entry.session.stop()
        if not entry.session.ended.wait(_END_S):
            raise Refused("the session of a smaller epoch has not ended yet")
        entry.session = None

    def _memory(self, entry: _Entry, hello: Hello) -> tuple[HeldMemory, bool]:
        """Returns the memory of a session, and whether it is that of before. Raises Refused."""
        if entry.memory is not None and hello.resumes and entry.memory.geometry == hello.geometry:
            entry.memory.take_over()
            return entry.memory, True
        needed = kv_bytes_of(hello.geometry)
        own = 0 if entry.memory is None else kv_bytes_of(entry.memory.geometry)
        free = self._most_bytes - self.held_bytes + own
        if needed > free:
            raise Refused(f"{needed} bytes of keys and values are asked for, and {free} are left", is_full=True)
        entry.memory = None  # before as much is set aside anew
        try:
            layers = allocate(hello.geometry, self._device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise Refused(f"the device ran out of memory ({cause_of(error)})", is_full=True) from error
        return HeldMemory(geometry=hello.geometry, device=self._device, layers=layers), False
