"""Knows where the attention workers of a replica listen. One that was lost may come back elsewhere."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from placement.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """The place where an attention worker listens, and its name in the configuration."""

    host: str
    port: int
    name: str = ""


class Whereabouts:
    """Holds the addresses of a replica's attention workers. Any thread may use it."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        """``addresses`` are in the order of the workers of the residency."""
        self._addresses = list(addresses)
        self._num_moves = 0
        self._moved = threading.Condition()

    @property
    def num_moves(self) -> int:
        """Counts how often a worker moved."""
        return self._num_moves

    def of(self, worker: int) -> Address:
        """Returns where a worker listens, as far as it is known."""
        with self._moved:
            return self._addresses[worker]

    def move(self, worker: int, address: Address) -> None:
        """Notes that a worker listens elsewhere. The same address as before counts too: another process may listen.

        Raises:
            InvalidRequest: the replica has no such worker, or nobody can listen there.
        """
        with self._moved:
            if not 0 <= worker < len(self._addresses):
                problem, fix = f"is none of {len(self._addresses)} attention workers", "Name one by its place."
                raise InvalidRequest(field="worker", value=worker, problem=problem, fix=fix)
            if not address.host or not 0 < address.port < 1 << 16:
                value = f"{address.host}:{address.port}"
                raise InvalidRequest(field="address", value=value, problem="is no address", fix="Give host and port.")
            self._addresses[worker] = address
            self._num_moves += 1
            self._moved.notify_all()

    def wait(self, num_moves: int, timeout_s: float) -> int:
        """Waits until more than ``num_moves`` moves have been noted, at most ``timeout_s``. Returns their number."""
        with self._moved:
            self._moved.wait_for(lambda: self._num_moves > num_moves, timeout_s)
            return self._num_moves
