"""Keeps the transfers of keys and values between replicas, each with a lease.

Whoever drives the core gives the event that a lease is over, once nobody reads or writes the blocks any more.
"""

from dataclasses import dataclass

from placement.serving.events import HoldLapsed
from placement.serving.kv.holds import Hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A transfer: keys and values on their way, to this replica or from it.

    Attributes:
        hold: keeps the blocks that are read or written.
        lapses_s: when the lease ends, in seconds of a monotonic clock.
    """

    sequence_id: int
    hold: Hold
    lapses_s: float
    is_incoming: bool


class Transfers:
    """Keeps the transfers that have neither ended nor lapsed."""

    def __init__(self, lease_s: float) -> None:
        """``lease_s`` is how long a transfer may take."""
        self._lease_s = lease_s
        self._open: dict[int, Transfer] = {}  # by hold

    def open(self, sequence_id: int, hold: Hold, now_s: float, *, is_incoming: bool) -> Transfer:
        """Begins a transfer, whose lease starts now."""
        lapses_s = now_s + self._lease_s
        transfer = Transfer(sequence_id=sequence_id, hold=hold, lapses_s=lapses_s, is_incoming=is_incoming)
        self._open[hold.hold_id] = transfer
        return transfer

    def find(self, hold_id: int) -> Transfer | None:
        """Returns the transfer of that hold, or None where it has ended, or lapsed, before."""
        return self._open.get(hold_id)

    def close(self, transfer: Transfer) -> None:
        """Ends a transfer."""
        del self._open[transfer.hold.hold_id]

    def of(self, sequence_id: int) -> Transfer | None:
        """Returns the transfer of a sequence's keys and values, or None where there is none."""
        return next((it for it in self._open.values() if it.sequence_id == sequence_id), None)

    @property
    def is_empty(self) -> bool:
        """Tells whether there are no transfers."""
        return not self._open

    @property
    def hold_ids(self) -> frozenset[int]:
        """Returns the ids of the holds of all transfers."""
        return frozenset(self._open)

    @property
    def next_lapse_s(self) -> float | None:
        """Returns when the next transfer lapses, unless it ends before; None where there is no transfer."""
        return min((transfer.lapses_s for transfer in self._open.values()), default=None)

    def lapsed(self, now_s: float) -> list[HoldLapsed]:
        """Returns an event for each transfer whose lease has ended by now."""
        return [HoldLapsed(hold_id=key) for key, transfer in self._open.items() if transfer.lapses_s <= now_s]
