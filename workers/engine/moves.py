"""Keeps the engine's side of transfers of keys and values, which come from other replicas or go to them."""

from collections.abc import Callable, Iterable

from placement.serving.events import Command, HoldLapsed, KvArrived, KvSent, Receive, Revoke, Ship
from placement.serving.replica import ReplicaCore
from workers.engine.inbox import KvCame
from workers.engine.sequences import EngineSequences
from workers.engine.types import KvExchange, KvTransfer

NO_EXCHANGE = "this worker exchanges no keys and values"
REVOKED = "they were not wanted any more"


class Moves:
    """Carries out the core's commands about transfers, and ends transfers before their blocks can be used by others.

    Everything runs on the engine's thread.

    Attributes:
        exchange: exchanges keys and values with other replicas; None: nothing can come or go.
    """

    def __init__(self, core: ReplicaCore, sequences: EngineSequences, clock: Callable[[], float]) -> None:
        self._core = core
        self._clock = clock
        self._sequences = sequences
        self._closed: list[bytes] = []
        self._holds: dict[int, int] = {}  # of what goes elsewhere, by the core's number of the sequence
        self._taken: set[int] = set()  # sequences that another replica has before this one knows that it computed them
        self.exchange: KvExchange | None = None

    def obey(self, commands: Iterable[Command]) -> None:
        """Carries out what the core decided about transfers; other commands are passed over."""
        for command in commands:
            match command:
                case Receive():
                    self._receive(command)
                case Ship(sequence_id=sequence_id, hold_id=hold_id):
                    self._holds[sequence_id] = hold_id
                case Revoke(hold_id=hold_id):
                    self._revoke(hold_id)
                case _:
                    pass

    def _receive(self, command: Receive) -> None:
        sequence = self._sequences.by_core_id[command.sequence_id]
        if self.exchange is None:
            sequence.transfer = KvTransfer(problem=NO_EXCHANGE)
            arrived = KvArrived(hold_id=command.hold_id, num_tokens=0)
            self._core.handle(arrived, self._clock())
        else:
            self.exchange.receive(command, sequence.submission)

    def _revoke(self, hold_id: int) -> None:
        """Stops what comes; what goes is closed already, and its blocks are free at once."""
        if hold_id in self._holds.values():
            self._holds = {key: held for key, held in self._holds.items() if held != hold_id}
            self._core.handle(KvSent(hold_id=hold_id), self._clock())
        elif self.exchange is not None:
            transfer = self._core.transfers.find(hold_id)
            sequence = None if transfer is None else self._sequences.by_core_id.get(transfer.sequence_id)
            if sequence is not None:
                sequence.transfer = KvTransfer(problem=REVOKED)
            self.exchange.revoke(hold_id)

    def came(self, message: KvCame) -> KvArrived:
        """Ends a transfer to this replica, and returns the event that tells the core."""
        self._close(message.transfer_id)
        transfer = self._core.transfers.find(message.hold_id)
        sequence = None if transfer is None else self._sequences.by_core_id.get(transfer.sequence_id)
        if transfer is not None and sequence is not None and not transfer.is_revoked:
            sequence.transfer = message.transfer
        return KvArrived(hold_id=message.hold_id, num_tokens=message.num_tokens)

    def taken(self, core_id: int | None, *, lapsed: bool) -> KvSent | HoldLapsed | None:
        """Ends a transfer from this replica, and returns the event that tells the core, or None where there is none.

        Args:
            core_id: the core's number of the sequence; None where it has ended before.
            lapsed: whether its lease is over, and it was not taken.
        """
        if core_id is None:
            return None
        if core_id not in self._holds:  # its last step has ended, and this thread has yet to learn of it
            self._taken.add(core_id)
            return None
        self.end(core_id)
        hold_id = self._holds.pop(core_id)
        return HoldLapsed(hold_id=hold_id) if lapsed else KvSent(hold_id=hold_id)

    def taken_early(self) -> list[KvSent | HoldLapsed]:
        """Returns the events of transfers that were taken before the core had them sent."""
        early = [core_id for core_id in self._taken if core_id in self._holds]
        self._taken.difference_update(early)
        return [event for core_id in early if (event := self.taken(core_id, lapsed=False)) is not None]

    def end(self, core_id: int) -> None:
        """Ends the transfer of a sequence that goes elsewhere, if it does: nothing is read for it from now on."""
        ship = self._sequences.by_core_id[core_id].submission.ship
        self._taken.discard(core_id)
        if ship is not None:
            self._close(ship.transfer_id)

    def take_closed(self) -> tuple[bytes, ...]:
        """Returns the transfers that ended since the last call, for the next step to tell the other ranks of."""
        closed, self._closed = tuple(self._closed), []
        return closed

    def _close(self, transfer_id: bytes) -> None:
        if self.exchange is not None and transfer_id:
            self.exchange.close(transfer_id)
            self._closed.append(transfer_id)
