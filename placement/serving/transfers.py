"""Keeps the transfers of keys and values between replicas.

Whoever drives the core knows how long the other replica may be silent, and gives the event that its lease is over, once
nobody reads or writes the blocks any more.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from placement.model.part import Span
from placement.serving.events import Receive, Revoke, Ship
from placement.serving.kv.holds import Hold
from placement.serving.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A transfer: keys and values on their way, to this replica or from it.

    Attributes:
        hold: keeps the blocks that are read or written.
        is_revoked: whether nobody wants the keys and values any more: only the end of the transfer is waited for.
    """

    sequence_id: int
    hold: Hold
    is_incoming: bool
    is_revoked: bool = False


class Transfers:
    """Keeps the transfers that have neither ended nor lapsed."""

    def __init__(self) -> None:
        self._open: dict[int, Transfer] = {}  # by hold

    def receive(self, sequence: Sequence, hold: Hold) -> Receive:
        """Begins a transfer to this replica, of what the prompt lacks but for its last token."""
        sequence_id, hold_id = sequence.sequence_id, hold.hold_id
        self._open[hold_id] = Transfer(sequence_id=sequence_id, hold=hold, is_incoming=True)
        tokens = Span(sequence.num_computed_tokens, sequence.num_prompt_tokens - 1)
        return Receive(sequence_id=sequence_id, hold_id=hold_id, tokens=tokens, table=sequence.block_table)

    def ship(self, sequence: Sequence, hold: Hold) -> Ship:
        """Begins a transfer from this replica, of a whole prompt."""
        sequence_id, hold_id = sequence.sequence_id, hold.hold_id
        self._open[hold_id] = Transfer(sequence_id=sequence_id, hold=hold, is_incoming=False)
        tokens = Span(0, sequence.num_prompt_tokens)
        return Ship(sequence_id=sequence_id, hold_id=hold_id, tokens=tokens, table=hold.blocks)

    def find(self, hold_id: int) -> Transfer | None:
        """Returns the transfer of that hold, or None where it has ended, or lapsed, before."""
        return self._open.get(hold_id)

    def close(self, transfer: Transfer) -> None:
        """Ends a transfer."""
        del self._open[transfer.hold.hold_id]

    def revoke(self, sequence_id: int) -> list[Revoke]:
        """Revokes the transfer of a sequence's keys and values, where there is one that is not revoked."""
        return self._revoke(it for it in self._open.values() if it.sequence_id == sequence_id)

    def revoke_all(self) -> list[Revoke]:
        """Revokes all transfers that are not revoked."""
        return self._revoke(self._open.values())

    def _revoke(self, transfers: Iterable[Transfer]) -> list[Revoke]:
        wanted = [transfer for transfer in transfers if not transfer.is_revoked]
        for transfer in wanted:
            self._open[transfer.hold.hold_id] = replace(transfer, is_revoked=True)
        return [Revoke(hold_id=transfer.hold.hold_id) for transfer in wanted]

    @property
    def is_empty(self) -> bool:
        """Tells whether there are no transfers."""
        return not self._open

    @property
    def hold_ids(self) -> frozenset[int]:
        """Returns the ids of the holds of all transfers."""
        return frozenset(self._open)
