"""Detects failed ranks: a thread sends each other rank a heartbeat, the pulse, and listens for theirs.

A rank may compute for seconds while others wait for it, so the length of a wait does not tell whether it is alive. Its
pulse does, because a process that is killed, frozen or cut off from the network sends none.
"""

import contextlib
import logging
import select
import threading
import time
from collections.abc import Mapping

from placement.errors import HeterodyneError, cause_of
from protos.codec.log_record import said
from workers.transport.errors import PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Incoming, Link, Outgoing, outgoing

logger = logging.getLogger(__name__)

TICK_S = 0.25
SILENCE_S = 1.5
_MOST_CAUSE_BYTES = 1000
# How long :meth:`Pulse.reason` waits for the pulse to tell why another connection of a rank broke.
_CAUSE_S = 0.3


class Pulse:
    """Watches the other ranks, and tells them when this one fails.

    Silence is counted in ticks of fixed length, however long a tick really took: after this process itself was held
    up, the pulses that came meanwhile have yet to be read.
    """

    def __init__(self, links: Mapping[int, Link], *, silence_s: float = SILENCE_S) -> None:
        """``links`` has a link to every other rank, by rank; a rank that is silent for ``silence_s`` counts as lost."""
        self._links = dict(links)
        self._silence_s = silence_s
        self._silent_s = dict.fromkeys(links, 0.0)
        self._lost: dict[int, PeerFailed] = {}
        self._first: PeerFailed | None = None
        self._receiving = {rank: _incoming(link) for rank, link in links.items()}
        self._sending: dict[int, Outgoing] = {}
        self._lock = threading.Lock()  # guards the frames that are being sent
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def lost(self) -> PeerFailed | None:
        """The error of the rank that was lost first, or None while all are alive."""
        return self._first

    def check(self) -> None:
        """Raises PeerFailed for the rank that was lost first, where one is."""
        if self._first is not None:
            raise PeerFailed(self._first.rank, self._first.cause)

    def reason(self, error: PeerFailed) -> PeerFailed:
        """Returns why a connection broke: the cause that the rank itself sent, or else ``error``."""
        with self._changed:
            self._changed.wait_for(lambda: error.rank in self._lost, _CAUSE_S)
            return self._lost.get(error.rank, error)

    def fail(self, cause: str) -> None:
        """Tells the other ranks that this one has failed and why, and stops."""
        text = memoryview(cause.encode()[:_MOST_CAUSE_BYTES])
        with self._lock:
            for rank, link in self._links.items():
                if rank in self._lost:
                    continue
                unfinished = self._sending.pop(rank, None)
                with contextlib.suppress(HeterodyneError):
                    if unfinished is None or unfinished.advance():
                        outgoing(link, Kind.FAILED, text).advance()
        self.stop()

    def stop(self) -> None:
        """Ends the thread, and waits for that for two ticks at most."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(2 * TICK_S)

    def _run(self) -> None:
        """Watches the other ranks; they count as lost where that fails, since nobody else would end waits for them."""
        try:
            self._watch()
        except BaseException as error:  # the border of the thread
            if self._stop.is_set():  # the connections may be closed by now
                return
            words = "The other ranks can no longer be watched."
            logger.exception(words, extra=said("pulse_failed"))
            for rank in self._links.keys() - self._lost.keys():
                self._lose(PeerFailed(rank, f"can no longer be watched: {cause_of(error)}"))

    def _watch(self) -> None:
        """Sends and receives pulses until :meth:`stop`, or until all other ranks are lost."""
        next_s = time.monotonic()
        while not self._stop.is_set() and len(self._lost) < len(self._links):
            now = time.monotonic()
            if now >= next_s:
                next_s = now + TICK_S
                self._beat()
            self._listen(max(0.0, next_s - time.monotonic()))

    def _beat(self) -> None:
        """Sends a pulse to all ranks whose sockets take one, and counts the silence of all."""
        for rank, link in self._links.items():
            if rank in self._lost:
                continue
            if self._silent_s[rank] >= self._silence_s:
                self._lose(PeerFailed(rank, f"is frozen or cut off: no pulse for {self._silence_s:g} s"))
                continue
            self._silent_s[rank] += TICK_S
            with self._lock:
                if rank not in self._sending:
                    self._sending[rank] = outgoing(link, Kind.PULSE, memoryview(b""))
                try:
                    if self._sending[rank].advance():
                        del self._sending[rank]
                except PeerFailed as error:
                    self._lose(error)

    def _listen(self, timeout_s: float) -> None:
        """Receives pulses and last words for ``timeout_s``."""
        poll = select.poll()
        ranks = {link.socket.fileno(): rank for rank, link in self._links.items() if rank not in self._lost}
        for number in ranks:
            poll.register(number, select.POLLIN)
        for number, _ in poll.poll(1000 * timeout_s):
            rank = ranks[number]
            try:
                while self._receiving[rank].advance():
                    self._receiving[rank] = _incoming(self._links[rank])
                    self._silent_s[rank] = 0.0
            except PeerFailed as error:
                self._lose(error)
            except HeterodyneError as error:
                self._lose(PeerFailed(rank, str(error)))

    def _lose(self, error: PeerFailed) -> None:
        """Notes that a rank is lost."""
        with self._changed:
            self._lost[error.rank] = error
            self._first = self._first or error
            self._changed.notify_all()


def _incoming(link: Link) -> Incoming:
    return Incoming(link=link, kind=Kind.PULSE, payload=None, max_bytes=_MOST_CAUSE_BYTES)
