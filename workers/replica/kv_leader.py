"""Has all ranks of a replica take part in transfers of keys and values, as the replica's leader.

Commands go to all other ranks on links of their own, in one order. A rank carries them out in that order, so that what
is closed before something else is expected is closed there first, too.
"""

import logging
import select
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from placement.errors import HeterodyneError, InvalidRequest, cause_of
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.collectives.group import COLLECTIVE_S
from workers.kv_transfer.awaited import Expected
from workers.kv_transfer.rank import RankTransfers
from workers.kv_transfer.sender import Target
from workers.replica.announcer import Announcer
from workers.replica.kv_messages import expect_message, open_message, parse
from workers.transport.errors import PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import MAX_MESSAGE_BYTES, Incoming, Link
from workers.transport.pulse import Pulse

logger = logging.getLogger(__name__)

_CHECK_MS = 100


class TransferFailed(HeterodyneError):
    """Keys and values did not come from another replica; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """A transfer to this replica.

    Attributes:
        ready: is done once all ranks expect it.
        arrived: gives the bytes that came once all ranks have theirs, or TransferFailed.
    """

    ready: Future[None]
    arrived: Future[int]


@dataclass(slots=True, kw_only=True)
class _Arriving:
    """The ranks whose keys and values have yet to come."""

    awaited: set[int]
    future: Future[int]
    num_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class _Command:
    """The ranks that have yet to carry a command out."""

    awaited: set[int]
    future: Future[None] = field(default_factory=lambda: _running())


class KvLeader:
    """Begins and ends transfers at all ranks. Any thread may call it, and no call waits for another rank.

    Attributes:
        rank: this rank's own side; None until :meth:`use`.
    """

    def __init__(self, links: Mapping[int, Link], pulse: Pulse | None) -> None:
        """Takes the KV links to all other ranks, by rank; both arguments are empty where there are none."""
        self._links = dict(links)
        self._pulse = pulse
        self._lock = threading.Lock()
        self._num_commands = 0
        self._commands: dict[int, _Command] = {}
        self._arriving: dict[bytes, _Arriving] = {}
        self._on_drop: dict[bytes, Callable[[str], None]] = {}
        self._broken: TransferFailed | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._announcer: Announcer | None = None
        self.rank: RankTransfers | None = None
        if pulse is not None and links:
            self._announcer = Announcer(links=tuple(links.values()), pulse=pulse, timeout_s=COLLECTIVE_S)
            self._thread = threading.Thread(target=self._listen, name="kv-leader", daemon=True)

    def use(self, rank: RankTransfers) -> None:
        """Sets this rank's own side, and begins to hear the others."""
        self.rank = rank
        if self._thread is not None:
            self._thread.start()

    def expect(self, expected: Expected) -> Expectation:
        """Has all ranks expect the keys and values of a sequence."""
        assert self.rank is not None
        arrived: Future[int] = _running()
        with self._lock:
            self._arriving[expected.transfer_id] = _Arriving(awaited={0, *self._links}, future=arrived)
        try:
            self.rank.expect(expected)
        except InvalidRequest as error:
            ready: Future[None] = _running()
            ready.set_exception(error)
        else:
            ready = self._command(expect_message(expected))
        return Expectation(ready=ready, arrived=arrived)

    def open(self, target: Target, *, on_drop: Callable[[str], None] = lambda _: None) -> Future[None]:
        """Has all ranks get ready to send the keys and values of a sequence; the result is done once they are.

        Args:
            on_drop: is told why, where a rank cannot send them, until the transfer is closed. It is called on other
                threads, and must only hand over.

        Raises:
            InvalidRequest: the target cannot be sent to.
        """
        assert self.rank is not None
        self.rank.open(target)
        with self._lock:
            self._on_drop[target.transfer_id] = on_drop
        return self._command(open_message(target))

    def dropped(self, transfer_id: bytes, problem: str, rank: int = 0) -> None:
        """Notes that a rank cannot send what it was to send."""
        with self._lock:
            on_drop = self._on_drop.pop(transfer_id, None)
        if on_drop is not None:
            on_drop(f"at rank {rank}: {problem}" if self._links else problem)

    def close(self, transfer_id: bytes) -> None:
        """Ends a transfer: here at once, and at the others before whatever they are told of later."""
        assert self.rank is not None
        self.rank.close(transfer_id)
        with self._lock:
            self._arriving.pop(transfer_id, None)
            self._on_drop.pop(transfer_id, None)
        self._command(pb.KvCommand(close=pb.KvClose(transfer_id=transfer_id)))

    def ended(self, transfer_id: bytes, problem: str, num_bytes: int, rank: int = 0) -> None:
        """Notes that a rank has all that it expected of a transfer, or what went wrong."""
        with self._lock:
            arriving = self._arriving.get(transfer_id)
            if arriving is None or arriving.future.done():
                return
            arriving.awaited.discard(rank)
            arriving.num_bytes += num_bytes
            if problem:
                where = f"at rank {rank}: " if self._links else ""
                arriving.future.set_exception(TransferFailed(f"{where}{problem}"))
            elif not arriving.awaited:
                arriving.future.set_result(arriving.num_bytes)

    def stop(self) -> None:
        """Ends all transfers, and the thread."""
        self._stopping.set()
        if self._announcer is not None:
            self._announcer.close()
        if self.rank is not None:
            self.rank.stop()

    def _command(self, message: pb.KvCommand) -> Future[None]:
        """Sends a command to all other ranks; the result is done once they have carried it out."""
        with self._lock:
            self._num_commands += 1
            command = _Command(awaited=set(self._links))
            if self._broken is not None:
                command.future.set_exception(self._broken)
                return command.future
            if self._announcer is None:
                command.future.set_result(None)
                return command.future
            message.number = self._num_commands
            self._commands[message.number] = command
            self._announcer.send(Kind.KV_COMMAND, memoryview(message.SerializeToString()))
        return command.future

    def _listen(self) -> None:
        """Hears what the other ranks say, until this is stopped or a rank is lost, which others notice."""
        frames = {rank: _incoming(link) for rank, link in self._links.items()}
        try:
            while not self._stopping.is_set():
                assert self._pulse is not None and self._announcer is not None
                self._pulse.check()
                self._announcer.check()
                for rank in self._readable():
                    while frames[rank].advance():
                        payload = frames[rank].payload
                        assert payload is not None
                        frames[rank] = _incoming(self._links[rank])
                        self._take(rank, parse(payload))
        except HeterodyneError as error:
            self._fail(error)
        except Exception as error:  # the border of the thread: nobody else would end what waits for it
            words = "The other ranks are not heard of transfers any more."
            logger.exception(words, extra=said("kv_leader_failed"))
            self._fail(error)

    def _readable(self) -> list[int]:
        poll = select.poll()
        ranks = {}
        for rank, link in self._links.items():
            number = link.socket.fileno()
            if number < 0:
                raise PeerFailed.ended_here(rank)
            ranks[number] = rank
            poll.register(number, select.POLLIN)
        return [ranks[number] for number, _ in poll.poll(_CHECK_MS)]

    def _take(self, rank: int, message: pb.KvCommand) -> None:
        match message.WhichOneof("command"):
            case "done":
                self._done(rank, message.number, message.done.problem)
            case "ended":
                ended = message.ended
                self.ended(ended.transfer_id, ended.problem, ended.num_bytes, rank)
            case "dropped":
                self.dropped(message.dropped.transfer_id, message.dropped.problem, rank)

    def _done(self, rank: int, number: int, problem: str) -> None:
        with self._lock:
            command = self._commands.get(number)
            if command is None:
                return
            command.awaited.discard(rank)
            if problem and not command.future.done():
                command.future.set_exception(TransferFailed(f"rank {rank} refuses: {problem}"))
            if not command.awaited:
                del self._commands[number]
                if not command.future.done():
                    command.future.set_result(None)

    def _fail(self, error: Exception) -> None:
        """Ends what is waited for, and whatever is begun later: another rank is lost, or is not heard any more."""
        with self._lock:
            self._broken = TransferFailed(cause_of(error))
            waiting: list[Future[None] | Future[int]] = [command.future for command in self._commands.values()]
            waiting += [arriving.future for arriving in self._arriving.values()]
            for future in waiting:
                if not future.done():
                    future.set_exception(self._broken)
            self._commands.clear()


def _running() -> Future[Any]:
    """Returns a future that only this side ends: who waits for it may be cancelled at any moment."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _incoming(link: Link) -> Incoming:
    return Incoming(link=link, kind=Kind.KV_COMMAND, payload=None, max_bytes=MAX_MESSAGE_BYTES)
