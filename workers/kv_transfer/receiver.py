"""Receives keys and values from the ranks of other replicas, and writes them to this rank's cache."""

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from kernels.attention import Run
from placement.errors import HeterodyneError
from placement.model.part import Span
from placement.serving.kv.peers import ReplicaRanks
from placement.serving.kv.portions import PortionLayouts
from protos.codec.log_record import said
from workers.kv_transfer.arrivals import Arrivals, LayerPortion, NotDue
from workers.kv_transfer.awaited import Awaited, AwaitedTransfers, Expected
from workers.kv_transfer.inbound import MOST_CONNECTIONS, Door, Inbound
from workers.kv_transfer.packing import MessagePlaces
from workers.kv_transfer.wire import INLINE, Piece, unpack_about, unpack_piece
from workers.model.kv_cache import KVCache
from workers.transport.errors import KvGone, PeerFailed
from workers.transport.frames import Kind

logger = logging.getLogger(__name__)

_CHECK_S = 0.5
# After a failure that nobody foresaw, so that one which stays costs little.
_PAUSE_S = 0.1
_END_S = 10.0
# So many frames of one connection are taken before the others have their turn.
_FRAMES_A_TURN = 8


class Elsewhere(Protocol):
    """Takes keys and values to where a rank's blocks are, such as to attention workers."""

    def scratch(self, num_tokens: int) -> KVCache:
        """Returns memory for the keys and values of so many tokens, in the rank's layers and KV heads."""

    def store(self, scratch: KVCache, tokens: Span, runs: Sequence[Run]) -> None:
        """Takes ``tokens``, those that the memory has, to the blocks of their sequence, which ``runs`` of slots are in.

        Once it has returned they are there for all later steps. It raises what keeps them from it.
        """


class KvReceiver:
    """Accepts source ranks of other replicas and writes what they send, on a thread of its own.

    Attributes:
        num_refused: pieces, and connections, that were refused: of an unknown or closed transfer or a wrong epoch, out
            of order or out of range.
    """

    def __init__(
        self,
        *,
        listener: socket.socket,
        epoch: int,
        rank: int,
        own: ReplicaRanks,
        cache: KVCache,
        head_dim: int,
        on_end: Callable[[bytes, str, int], None],
        shared_memory: bool = True,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """Keeps what it is given; nothing runs before :meth:`start`.

        Args:
            listener: listens already and does not block. Nobody else accepts on it; its owner closes it.
            epoch: the epoch of this replica, whose ranks are ``own`` and among which this is ``rank``.
            cache: what is received goes there.
            on_end: is called with each expected transfer, the problem with which it failed ("": all has come) and the
                bytes that came, on the receiver's thread; once, and not after the transfer was closed. It must not
                raise.
            shared_memory: whether ranks on the same machine may send through memory that both share.
            elsewhere: takes what is received, where this rank's cache is not the place of all blocks.
        """
        self._own = own
        self._rank = rank
        self._cache = cache
        self._head_dim = head_dim
        self._on_end = on_end
        self._elsewhere = elsewhere
        self._door = Door(listener, rank=rank, epoch=epoch, shares_memory=shared_memory)
        self._transfers = AwaitedTransfers()
        self._inbound: dict[int, Inbound] = {}
        self._num_refused = 0
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="kv-receiver", daemon=True)

    @property
    def num_refused(self) -> int:
        """Counts pieces and connections that were refused."""
        return self._num_refused + self._door.num_refused

    def start(self) -> None:
        """Starts to accept."""
        self._thread.start()

    def expect(self, expected: Expected) -> None:
        """Awaits a transfer. Where this rank needs nothing of it, the transfer ends at once.

        Raises:
            InvalidRequest: the source's ranks do not hold all that this rank needs, or the transfer is awaited already.
        """
        layouts = PortionLayouts(
            source=expected.source, target=self._own, head_dim=self._head_dim, format=expected.format
        )
        arrivals = Arrivals(layouts, rank=self._rank, tokens=expected.tokens)
        cache, runs = self._cache, expected.runs
        if self._elsewhere is not None:  # all of it, since nobody else would take it in this order
            tokens = expected.tokens
            cache, runs = self._elsewhere.scratch(len(tokens)), ((-tokens.start, len(tokens)),)
        self._transfers.add(Awaited(expected, layouts, arrivals, cache, runs))
        self._wake_up()

    def close(self, transfer_id: bytes) -> None:
        """Stops awaiting a transfer. Once it has returned, nothing of it is written to the cache.

        It waits for a piece of this transfer that is being written, and for no other.
        """
        self._transfers.close(transfer_id)

    def stop(self) -> None:
        """Ends the thread and closes all connections. Transfers that are awaited end without a word."""
        self._stopped = True
        self._wake_up()
        if self._thread.is_alive():
            self._thread.join(_END_S)
        self._transfers.clear()
        for inbound in self._inbound.values():
            inbound.close()
        self._inbound.clear()
        self._door.close()
        self._wake.close()
        self._woken.close()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # it is about to wake, or has ended
            self._wake.send(b"x")

    def _run(self) -> None:
        """Receives until it is stopped, whatever happens: nobody else would tell that a transfer has no end.

        It also ends once the listener is closed, as it is where the process ends in the middle of its start.
        """
        while self._is_open():
            try:
                self._turn()
            except Exception as error:
                if not self._is_open():
                    return
                logger.exception("Receiving keys and values failed.", extra=said("kv_receiving_failed"))
                for awaited in self._transfers.every():
                    self._transfers.end(awaited, f"receiving failed ({_cause(error)})")
                time.sleep(_PAUSE_S)
            self._tell()

    def _is_open(self) -> bool:
        return not self._stopped and not self._door.is_closed

    def _turn(self) -> None:
        """Waits for something to come, and takes it."""
        poll = select.poll()
        for number in [self._woken.fileno(), *self._door.numbers]:
            poll.register(number, select.POLLIN)
        for number, inbound in self._inbound.items():
            poll.register(number, inbound.events)
        ready = {number for number, _ in poll.poll(1000 * _CHECK_S)}
        if self._woken.fileno() in ready:
            self._woken.recv(4096)
        for number in ready & self._inbound.keys():
            self._hear(number, self._inbound[number])
        for inbound in self._door.advance(ready):
            self._admit(inbound)

    def _tell(self) -> None:
        """Tells of the transfers that have ended."""
        while (end := self._transfers.next_end()) is not None:
            try:
                self._on_end(*end)
            except Exception:  # the others are to be told all the same
                logger.exception("The end of a transfer was not taken.", extra=said("kv_end_lost"))

    def _admit(self, inbound: Inbound) -> None:
        """Takes a connection. Where there are too many, the one that was silent for longest makes room."""
        if len(self._inbound) >= MOST_CONNECTIONS:
            in_use = {id(it) for awaited in self._transfers.every() for it in awaited.inbound.values()}
            idle = [(it.heard_s, number) for number, it in self._inbound.items() if id(it) not in in_use]
            if not idle:
                inbound.close()
                return
            self._inbound.pop(min(idle)[1]).close()
        self._inbound[inbound.link.socket.fileno()] = inbound

    def _hear(self, number: int, inbound: Inbound) -> None:
        """Takes the frames that have come over a connection."""
        try:
            self._take_frames(inbound)
        except Exception as error:
            is_damaged = inbound.is_within_frame or not isinstance(error, PeerFailed)
            if not isinstance(error, HeterodyneError):  # nobody foresaw it, and the other connections are well
                logger.exception("Receiving keys and values failed.", extra=said("kv_receiving_failed"))
            self._inbound.pop(number)
            self._lose(inbound, _cause(error), is_damaged=is_damaged)
            inbound.close()

    def _take_frames(self, inbound: Inbound) -> None:
        inbound.flush()
        for _ in range(_FRAMES_A_TURN):
            frame = inbound.receive()
            if frame is None:
                break
            kind, payload = frame
            if kind is Kind.KV_PIECE:
                self._take(inbound, *unpack_piece(payload))
            else:
                self._give_up(inbound, *unpack_about(payload))
        inbound.flush()

    def _take(self, inbound: Inbound, piece: Piece, inline: memoryview) -> None:
        """Takes a piece, or refuses it. Raises BadFrame where its body is damaged."""
        inbound.check_slot(piece)
        awaited = self._transfers.find(piece.transfer_id)
        if awaited is None or not self._has_written(awaited, inbound, piece, inline):
            self._num_refused += 1
            inbound.refuse(piece.transfer_id)
        if piece.slot != INLINE:
            inbound.acknowledge(piece.slot)

    def _has_written(self, awaited: Awaited, inbound: Inbound, piece: Piece, inline: memoryview) -> bool:
        """Writes a piece, unless it is not due or its transfer has been closed; returns whether it was taken."""
        if not inbound.is_from(awaited.expected.source):
            return False
        with awaited.lock:
            if self._transfers.find(piece.transfer_id) is not awaited:  # it was closed a moment ago
                return False
            try:
                self._write(awaited, inbound, piece, inline)
            except (NotDue, KvGone) as error:  # in the second case the source is well, and so are its other transfers
                self._transfers.end(awaited, str(error))
                return False
            except Exception as error:  # what failed was counted as having come, perhaps
                self._transfers.end(
                    awaited, f"a part from rank {inbound.rank} of the source was not taken: {_cause(error)}"
                )
                raise
        return True

    def _write(self, awaited: Awaited, inbound: Inbound, piece: Piece, inline: memoryview) -> None:
        if awaited.inbound.get(inbound.rank, inbound) is not inbound:
            raise NotDue(f"rank {inbound.rank} sent a part over another connection")
        memory = awaited.arrivals.begin(inbound.rank, piece)
        awaited.inbound[inbound.rank] = inbound
        inbound.body(piece, memory, inline)
        portion = awaited.arrivals.finish(inbound.rank, piece)
        if portion is not None:
            self._unpack(awaited, inbound.rank, portion)
        if awaited.arrivals.is_complete:
            if self._elsewhere is not None:
                self._elsewhere.store(awaited.cache, awaited.expected.tokens, awaited.expected.runs)
            self._transfers.end(awaited, "")

    def _unpack(self, awaited: Awaited, source: int, portion: LayerPortion) -> None:
        known, places = awaited.places.get(source, (None, None))
        if places is None or known != portion.portion:
            places = MessagePlaces(
                layout=portion.layout,
                part=self._own.parts[self._rank],
                cache=awaited.cache,
                runs=awaited.runs,
                layouts=awaited.layouts,
            )
            awaited.places[source] = portion.portion, places
        places.of(portion.layer).unpack(torch.frombuffer(portion.memory, dtype=torch.uint8))

    def _give_up(self, inbound: Inbound, transfer_id: bytes, cause: str) -> None:
        """Ends a transfer of which its source says that no more will come."""
        awaited = self._transfers.find(transfer_id)
        if awaited is not None and inbound.is_from(awaited.expected.source):
            self._transfers.end(awaited, f"rank {inbound.rank} of the source says: {cause}")

    def _lose(self, inbound: Inbound, cause: str, *, is_damaged: bool) -> None:
        """Ends the transfers that awaited more from a connection that broke or is damaged.

        What was damaged may have been the first piece of any transfer, so all end that awaited bytes from that rank.
        """
        for awaited in self._transfers.every():
            own = awaited.inbound.get(inbound.rank)
            is_first = own is None and is_damaged and inbound.is_from(awaited.expected.source)
            if (own is inbound or is_first) and awaited.arrivals.awaits(inbound.rank):
                self._transfers.end(awaited, f"the connection with rank {inbound.rank} of the source ended: {cause}")
        logger.debug("A source rank's connection ended: %s", cause, extra=said("kv_source_lost", cause=cause))


def _cause(error: Exception) -> str:
    """Says what went wrong, with the kind of error where the words are not ours."""
    return str(error) if isinstance(error, HeterodyneError) else f"{type(error).__name__}: {error}"
