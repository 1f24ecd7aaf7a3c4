"""Sends a leader's announcements of steps to the ranks that follow, without blocking the thread that makes them."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from workers.transport.errors import PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import Link, Outgoing, complete, outgoing
from workers.transport.pulse import Pulse

MOST_QUEUED = 64
"""Announcements that may wait to be sent: no fewer than the steps that a leader dispatches ahead."""

_CLOSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Announcement:
    """An announcement that waits to be sent.

    Attributes:
        frames: the frames that were not sent whole when it was queued.
        deadline_s: when they must be, on the clock of :func:`time.monotonic`.
    """

    frames: Sequence[Outgoing]
    deadline_s: float


class Announcer:
    """Sends every frame to all links, in the order of the calls. :meth:`send` never blocks.

    A frame goes out at once where the sockets take it whole and nothing waits before it. Else it joins a bounded
    queue, which a thread sends; the thread lives as long as something is queued. A failure ends all sending, and
    :meth:`check` raises it from then on.
    """

    def __init__(self, *, links: Sequence[Link], pulse: Pulse, timeout_s: float) -> None:
        """``timeout_s`` is how long a rank may take to accept an announcement."""
        self._links = tuple(links)
        self._pulse = pulse
        self.timeout_s = timeout_s
        self._lock = threading.Lock()  # guards what follows, and the order of frames
        self._queue: deque[_Announcement] = deque()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._closed = False

    def send(self, kind: Kind, payload: memoryview) -> None:
        """Sends a frame to all links, or queues what the sockets do not take now. For one thread at a time."""
        with self._lock:
            if self._closed or self._failure is not None:
                return
            frames = [outgoing(link, kind, payload) for link in self._links]
            try:
                unsent = frames if self._queue else [frame for frame in frames if not frame.advance()]
            except PeerFailed as error:
                self._failure = error
                return
            if unsent:
                self._enqueue(_Announcement(frames=unsent, deadline_s=time.monotonic() + self.timeout_s))

    def check(self) -> None:
        """Raises what kept an announcement from being sent; PeerFailed where a rank was lost or is too slow."""
        failure = self._failure
        if isinstance(failure, PeerFailed):
            raise self._pulse.reason(failure) from failure
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Gives up what is queued, and waits for the thread to end, for a second at most."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_S)

    def _enqueue(self, announcement: _Announcement) -> None:
        """Appends to the queue, and starts the thread where none is running. The caller holds the lock."""
        if len(self._queue) >= MOST_QUEUED:
            # The oldest announcement holds up all others; where it was just sent whole, the thread is making room.
            unsent = [frame for frame in self._queue[0].frames if frame.parts]
            if unsent:
                cause = f"has not taken any of {MOST_QUEUED} announced steps"
                self._failure = PeerFailed(unsent[0].link.peer, cause)
                return
        self._queue.append(announcement)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        """Sends the queue until it is empty; on the thread of this class."""
        try:
            while True:
                first = self._queue[0]
                complete(first.frames, [], deadline_s=first.deadline_s, alive=self._go_on)
                with self._lock:
                    self._queue.popleft()
                    if not self._queue:
                        self._thread = None
                        return
        except _Closed:
            pass
        except BaseException as error:  # the border of the thread: the next step raises it
            self._failure = error

    def _go_on(self) -> None:
        """Raises where the thread is to end: this is closed, has failed, or a rank is lost."""
        if self._closed or self._failure is not None:
            raise _Closed
        self._pulse.check()


class _Closed(Exception):
    """The thread is to send no more."""
