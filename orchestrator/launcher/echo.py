"""Passes on what a child process prints, whatever becomes of standard error.

Whoever reads the pipe of a child must go on reading until the child ends, as a full pipe stops it. So the loss of
standard error is no error here, and who reads on an event loop leaves the writing to a thread.
"""

import asyncio
import contextlib
import queue
import sys
import threading
import time

_MOST_LINES = 10_000
_POLL_S = 0.01
# Longer than a terminal or a pipe that is read takes for its next lines.
_STALLED_S = 1.0


def print_line(line: str) -> None:
    """Prints a line to standard error; drops it where nobody reads there any more, or the stream is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class Echo:
    """Prints lines in a thread of its own, in their order, for a caller on an event loop.

    Where standard error takes no lines for a second while many of them wait, the lines that come are dropped until it
    takes some again.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(maxsize=_MOST_LINES)
        self._is_stalled = False
        self._thread = threading.Thread(target=self._print, name="child-output", daemon=True)
        self._thread.start()

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            print_line(line)

    async def put(self, line: str) -> None:
        """Hands over a line, which is printed soon. Waits while many are to be printed before it."""
        deadline = time.monotonic() + _STALLED_S
        while self._lines.full():
            if self._is_stalled or time.monotonic() > deadline:
                self._is_stalled = True
                return
            await asyncio.sleep(_POLL_S)
        self._is_stalled = False
        self._lines.put_nowait(line)

    def end(self) -> None:
        """Lets the thread end after the last line; no other is put after this."""
        if self._lines.full():
            with contextlib.suppress(queue.Empty):  # the thread was faster
                self._lines.get_nowait()
        self._lines.put_nowait(None)

    async def ended(self) -> None:
        """Waits until all lines are printed, or a second is over."""
        deadline = time.monotonic() + _STALLED_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
