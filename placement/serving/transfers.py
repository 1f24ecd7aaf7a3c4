"""Keeps the transfers of keys and values between replicas.

Whoever drives the core knows how long the other replica may be silent, and gives the event that its lease is over, once
nobody reads or writes the blocks any more.
"""

from dataclasses import dataclass

from placement.serving.kv.holds import Hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A transfer: keys and values on their way, to this replica or from it.

    Attributes:
        hold: keeps the blocks that are read or written.
    """

    sequence_id: int
    hold: Hold
    is_incoming: bool


class Transfers:
    """Keeps the transfers that have neither ended nor lapsed."""

    def __init__(self) -> None:
        self._open: dict[int, Transfer] = {}  # by hold

    def open(self, sequence_id: int, hold: Hold, *, is_incoming: bool) -> None:
        """Begins a transfer."""
        self._open[hold.hold_id] = Transfer(sequence_id=sequence_id, hold=hold, is_incoming=is_incoming)

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
