"""Writes what a process prints in a thread of its own, so that whoever prints never waits for whoever reads.

A terminal that is paused, or a pager, takes nothing for as long as it likes, and a thread that prints into it stands
until it goes on. Here all that is printed passes through one bounded queue, in its order. Where the reader takes
nothing for a second while the queue is full, what comes is dropped until there is room again, and the next line says
how much that was.
"""

import asyncio
import contextlib
import io
import os
import queue
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_MOST_TEXTS = 10_000
_POLL_S = 0.01
# Longer than a terminal or a pipe that is read takes for its next lines.
STALLED_S = 1.0
# The longest that the last lines are waited for while they are read, however slowly.
_END_S = 10.0

# Returns the line, with its end, which says that so many lines were dropped.
SayDropped = Callable[[int], str]


def dropped_words(num_lines: int) -> str:
    """Says how many lines are missing."""
    lines = "1 line is" if num_lines == 1 else f"{num_lines} lines are"
    return f"{lines} missing here, as nothing read this output for a while."


def _plain(num_lines: int) -> str:
    return f"{dropped_words(num_lines)}\n"


class OutputWriter:
    """Writes texts to streams in a thread of its own, in the order in which they are handed over.

    Any thread may hand texts over, also from a finalizer that interrupts another hand-over. A stream that is closed,
    or that nobody reads any more, takes nothing: no service ends for that.

    Args:
        say_dropped: writes the line that stands in the place of lines which were dropped.
    """

    def __init__(self, *, say_dropped: SayDropped = _plain, most_texts: int = _MOST_TEXTS) -> None:
        self._say_dropped = say_dropped
        self._most_texts = most_texts
        self._texts: queue.SimpleQueue[tuple[str, TextIO] | None] = queue.SimpleQueue()
        self._lock = threading.RLock()
        self._dropped: Counter[TextIO] = Counter()
        self._is_stalled = False
        self._num_written = 0
        self._thread = threading.Thread(target=self._write_all, name="output", daemon=True)
        self._thread.start()

    def _write_all(self) -> None:
        while (item := self._texts.get()) is not None:
            _write(*item)
            self._num_written += 1
        for stream, num_dropped in self._dropped.items():
            _write(self._say_dropped(num_dropped), stream)

    def put(self, text: str, stream: TextIO) -> None:
        """Hands over a text, which is written soon. Waits for a second at most where many are to be written before."""
        deadline = time.monotonic() + STALLED_S
        while not self._take(text, stream, deadline):
            time.sleep(_POLL_S)

    async def put_async(self, text: str, stream: TextIO) -> None:
        """Hands over a text as ``put`` does, and lets other tasks run while it waits."""
        deadline = time.monotonic() + STALLED_S
        while not self._take(text, stream, deadline):
            await asyncio.sleep(_POLL_S)

    def _take(self, text: str, stream: TextIO, deadline: float) -> bool:
        """Queues a text, or drops it where the reader has stalled. Returns False where it is to be tried again."""
        with self._lock:
            if self._texts.qsize() >= self._most_texts:
                self._is_stalled = self._is_stalled or time.monotonic() > deadline
                if self._is_stalled:
                    self._dropped[stream] += max(1, text.count("\n"))
                return self._is_stalled
            self._is_stalled = False
            if num_dropped := self._dropped.pop(stream, 0):
                self._texts.put((self._say_dropped(num_dropped), stream))
            self._texts.put((text, stream))
            return True

    def end(self) -> None:
        """Lets the thread end after the last text; no other is put after this."""
        self._texts.put(None)

    def wait_end(self) -> None:
        """Waits until all is written, or nothing was for a second, or ten are over."""
        end_s = time.monotonic() + _END_S
        num_written, deadline = self._num_written, time.monotonic() + STALLED_S
        while self._thread.is_alive() and time.monotonic() < min(deadline, end_s):
            if self._num_written != num_written:
                num_written, deadline = self._num_written, time.monotonic() + STALLED_S
            self._thread.join(_POLL_S)

    async def ended(self) -> None:
        """Waits until all is written, or a second is over."""
        deadline = time.monotonic() + STALLED_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)


def _write(text: str, stream: TextIO) -> None:
    """Writes a text; drops it where nobody reads there any more, or the stream is closed."""
    with contextlib.suppress(OSError, ValueError):
        try:
            descriptor = stream.fileno()
        except io.UnsupportedOperation:  # a stream in memory
            stream.write(text)
            stream.flush()
            return
        # Past the stream's own buffer: a thread that stands while it holds the lock of that ends the interpreter.
        errors = "backslashreplace" if stream.errors in (None, "strict") else stream.errors
        left = memoryview(text.encode(stream.encoding or "utf-8", errors))
        while left:
            try:
                left = left[os.write(descriptor, left) :]
            except BlockingIOError:  # whoever shares the terminal made it so
                select.select((), (descriptor,), ())


class _QueuedStream(io.TextIOBase):
    """Takes the place of a standard stream, and hands what is printed there to a writer, whole lines at a time."""

    def __init__(self, writer: OutputWriter, stream: TextIO) -> None:
        self._writer = writer
        self._stream = stream
        # Of each thread, as `print` writes the end of a line separately.
        self._unended = threading.local()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the base has attributes that cannot be written
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        self._unended.text = getattr(self._unended, "text", "") + text
        if text.endswith("\n"):
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self._unended.text = getattr(self._unended, "text", ""), ""
        if text:
            self._writer.put(text, self._stream)


@contextmanager
def queued_output(say_dropped: SayDropped = _plain) -> Iterator[None]:
    """Passes all that this process prints for the length of the block through one :class:`OutputWriter`.

    At its end what was printed is waited for, so that it comes before whatever is printed next.
    """
    writer = OutputWriter(say_dropped=say_dropped)
    names = [name for name in ("stdout", "stderr") if getattr(sys, name) is not None]
    streams = {name: getattr(sys, name) for name in names}
    queued = {name: _QueuedStream(writer, stream) for name, stream in streams.items()}
    for name, stream in queued.items():
        with contextlib.suppress(OSError, ValueError):
            streams[name].flush()
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in queued.items():
            stream.flush()
            if getattr(sys, name) is stream:
                setattr(sys, name, streams[name])
        writer.end()
        writer.wait_end()
