"""Sends the keys and values that this rank's steps compute to the ranks of other replicas."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from kernels.attention import Run
from placement.errors import InvalidRequest
from placement.model.part import Span
from placement.serving.kv.peers import KvFormat, ReplicaRanks, Shipment
from placement.serving.kv.portions import PortionLayouts, portions
from placement.serving.kv.rectangles import common_layers
from protos.codec.log_record import said
from workers.kv_transfer.courier import Courier, Job, Opened
from workers.kv_transfer.packing import MessagePlaces
from workers.kv_transfer.shared_memory import host_digest
from workers.kv_transfer.wire import Hello
from workers.model.kv_cache import KVCache
from workers.model.progress import LayerProgress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A transfer to another replica.

    Attributes:
        transfer_id: names the transfer.
        ranks: the ranks of the replica that receives.
        tokens: the positions in the sequence that go.
        format: how they are written.
    """

    transfer_id: bytes
    ranks: ReplicaRanks
    tokens: Span
    format: KvFormat


@dataclass(slots=True)
class _Outgoing:
    """An open transfer, the target ranks that get something from this one, and the layers that each gets."""

    target: Target
    opened: Opened
    layers: dict[int, Span]
    couriers: dict[int, Courier] = field(default_factory=dict)
    num_shipped: int = 0  # the token up to which portions were queued


class KvSender:
    """Sends portions of sequences to the ranks that will hold them, on a thread for each of those ranks.

    Attributes:
        num_sent_bytes: bytes of keys and values that were sent.
    """

    def __init__(
        self,
        *,
        epoch: int,
        rank: int,
        own: ReplicaRanks,
        cache: KVCache,
        head_dim: int,
        on_drop: Callable[[bytes, str], None],
    ) -> None:
        """Starts nothing.

        Args:
            epoch: the epoch of this replica, whose ranks are ``own`` and among which this is ``rank``.
            cache: where the keys and values are that are sent.
            head_dim: the numbers of a key, and of a value.
            on_drop: is called with each open transfer that cannot go on, and the problem, on a thread that sends; once,
                and not after the transfer was closed. It must not raise.
        """
        self._epoch = epoch
        self._rank = rank
        self._own = own
        self._cache = cache
        self._head_dim = head_dim
        self._on_drop = on_drop
        self._lock = threading.Lock()
        self._transfers: dict[bytes, _Outgoing] = {}
        self._couriers: dict[tuple[tuple[str, int], int, int], Courier] = {}
        self._stopped = False
        self.num_sent_bytes = 0

    def open(self, target: Target) -> None:
        """Opens a transfer, of which portions may be shipped from then on.

        Raises:
            InvalidRequest: it is open already.
        """
        layouts = PortionLayouts(source=self._own, target=target.ranks, head_dim=self._head_dim, format=target.format)
        own = self._own.parts[self._rank]
        layers = {rank: common_layers(own, part, target.tokens) for rank, part in enumerate(target.ranks.parts)}
        shared = {rank: span for rank, span in layers.items() if span}
        outgoing = _Outgoing(target, Opened(target.transfer_id, layouts), shared, num_shipped=target.tokens.start)
        with self._lock:
            if target.transfer_id in self._transfers:
                raise InvalidRequest(
                    field="transfer_id",
                    value=target.transfer_id.hex(),
                    problem="is open already",
                    fix="Give each transfer a name of its own.",
                )
            self._transfers[target.transfer_id] = outgoing

    def ship(self, shipment: Shipment, runs: Sequence[Run], progress: LayerProgress) -> None:
        """Queues a portion, of which each layer is sent once it is written. Never blocks.

        Args:
            shipment: the tokens. A transfer that is not open is passed over: it was closed, or its target refused it.
            runs: the slots of all tokens up to the portion's last, of all ranks, in token order.
            progress: how far the step is that computes the last of them.
        """
        with self._lock:
            outgoing = self._transfers.get(shipment.transfer_id)
            if outgoing is None or self._stopped:
                return
            outgoing.num_shipped = shipment.tokens.stop
            for rank, layers in outgoing.layers.items():
                jobs = [
                    Job(
                        opened=outgoing.opened,
                        portion=portion,
                        layers=layers,
                        first_layer=self._own.parts[self._rank].layers.start,
                        progress=progress,
                        make_places=partial(self._places, outgoing.opened.layouts, portion, rank, tuple(runs)),
                    )
                    for portion in portions(shipment.tokens)
                ]
                courier = self._courier(outgoing.target.ranks, rank)
                if not courier.put(jobs):  # it ended a moment ago
                    courier = self._courier(outgoing.target.ranks, rank)
                    courier.put(jobs)
                outgoing.couriers[rank] = courier

    def _places(self, layouts: PortionLayouts, portion: Span, rank: int, runs: tuple[Run, ...]) -> MessagePlaces:
        return MessagePlaces(
            layout=layouts.of(portion, source=self._rank, target=rank),
            part=self._own.parts[self._rank],
            cache=self._cache,
            runs=runs,
            layouts=layouts,
        )

    def _courier(self, ranks: ReplicaRanks, rank: int) -> Courier:
        """Returns the thread that sends to a target rank. The lock is held."""
        self._couriers = {key: courier for key, courier in self._couriers.items() if not courier.has_ended}
        key = ranks.addresses[rank], rank, ranks.epoch
        courier = self._couriers.get(key)
        if courier is None:
            hello = Hello(self._rank, self._epoch, self._own.incarnation, rank, ranks.epoch, host_digest())
            courier = Courier(ranks.addresses[rank], hello, drop=self._drop, sent=self._count)
            self._couriers[key] = courier
        return courier

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.num_sent_bytes += num_bytes

    def _drop(self, opened: Opened, problem: str) -> None:
        """Closes a transfer that cannot go on, and says so. Called on threads that send, which hold no lock."""
        if not self._close(opened.transfer_id, problem, failed=opened):
            return
        logger.warning(
            "A transfer of keys and values ended: %s.", problem, extra=said("kv_transfer_ended", cause=problem)
        )
        self._on_drop(opened.transfer_id, problem)

    def close(self, transfer_id: bytes) -> None:
        """Closes a transfer, which may be unknown. Nothing that is copied from the cache after it has returned is sent.

        A thread may still be copying a layer then, and throws it away. What was copied before may be on its way. Where
        not all was sent, the targets are told.
        """
        self._close(transfer_id, "it was closed by its source")

    def _close(self, transfer_id: bytes, problem: str, *, failed: Opened | None = None) -> bool:
        """Closes a transfer: whichever is open, or only the one that failed. Returns whether it was open."""
        with self._lock:
            outgoing = self._transfers.get(transfer_id)
            if outgoing is None or (failed is not None and failed is not outgoing.opened):
                return False
            del self._transfers[transfer_id]
            is_cut = failed is not None or outgoing.num_shipped < outgoing.target.tokens.stop
            outgoing.opened.close(problem)
            for courier in outgoing.couriers.values():
                if is_cut or courier.owes(outgoing.opened):
                    courier.notify(outgoing.opened)
            return True

    def stop(self) -> None:
        """Ends all threads and closes their connections, whatever is still to be sent."""
        with self._lock:
            self._stopped = True
            couriers = list(self._couriers.values())
            self._couriers.clear()
            self._transfers.clear()
        for courier in couriers:
            courier.stop()
        for courier in couriers:
            courier.join()
