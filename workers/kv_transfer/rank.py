"""A rank's own side of all transfers, to and from other replicas."""

import socket
from collections.abc import Callable, Sequence

from kernels.attention import Run
from placement.errors import InvalidRequest
from placement.serving.kv.peers import ReplicaRanks, Shipment
from workers.kv_transfer.awaited import Expected
from workers.kv_transfer.receiver import Elsewhere, KvReceiver
from workers.kv_transfer.sender import KvSender, Target
from workers.model.kv_cache import KVCache
from workers.model.progress import LayerProgress


def _tell_nobody(transfer_id: bytes, problem: str) -> None:
    """Takes word of a transfer that nobody asks for."""


class RankTransfers:
    """Sends keys and values of this rank's cache to ranks of other replicas, and receives some from there.

    Attributes:
        own: the ranks of this replica.
    """

    def __init__(
        self,
        *,
        rank: int,
        own: ReplicaRanks,
        cache: KVCache,
        head_dim: int,
        listener: socket.socket,
        on_end: Callable[[bytes, str, int], None],
        on_drop: Callable[[bytes, str], None] = _tell_nobody,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """Takes the socket at which this rank listens; ranks of other replicas connect there from now on.

        Args:
            on_end: is told once of each transfer that was expected and has ended: its name, what went wrong or "", and
                how many bytes came.
            on_drop: is told once of each transfer that was opened and cannot go on: its name, and what went wrong. It
                must not raise.
            elsewhere: takes what is received to where it belongs; then nothing can be sent from here. None: ``cache``
                is the place of all blocks.
        """
        self.own = own
        self._sender = KvSender(epoch=own.epoch, rank=rank, own=own, cache=cache, head_dim=head_dim, on_drop=on_drop)
        self._receiver = KvReceiver(
            listener=listener,
            epoch=own.epoch,
            rank=rank,
            own=own,
            cache=cache,
            head_dim=head_dim,
            on_end=on_end,
            elsewhere=elsewhere,
        )
        self._can_send = elsewhere is None
        self._receiver.start()

    @property
    def num_refused(self) -> int:
        """Counts the pieces that were refused, as their transfer was over or their sender is fenced."""
        return self._receiver.num_refused

    def expect(self, expected: Expected) -> None:
        """Takes the keys and values of a sequence from now on. Raises InvalidRequest where they cannot be complete."""
        self._receiver.expect(expected)

    def open(self, target: Target) -> None:
        """Gets ready to send the keys and values of a sequence.

        Raises:
            InvalidRequest: that is open already, or attention workers hold them.
        """
        if not self._can_send:
            problem, fix = "cannot be sent from here: attention workers hold keys and values", "Ask another replica."
            raise InvalidRequest(field="prefill", problem=problem, fix=fix)
        self._sender.open(target)

    def ship(self, shipment: Shipment, runs: Sequence[Run], progress: LayerProgress) -> None:
        """Implements :meth:`workers.step.types.Shipper.ship`."""
        self._sender.ship(shipment, runs, progress)

    def close(self, transfer_id: bytes) -> None:
        """Implements :meth:`workers.step.types.Shipper.close`."""
        self._sender.close(transfer_id)
        self._receiver.close(transfer_id)

    def stop(self) -> None:
        """Ends all connections and threads."""
        self._sender.stop()
        self._receiver.stop()
