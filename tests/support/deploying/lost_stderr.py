"""A standard error that takes nothing: closed, or a pipe whose reader has gone, or does not read."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from enum import Enum
from unittest import mock


class Loss(Enum):
    """Why nothing can be printed."""

    CLOSED = "closed"
    BROKEN = "broken"
    STALLED = "stalled"


@contextlib.contextmanager
def lost_stderr(loss: Loss) -> Iterator[None]:
    """Puts such a stream in the place of ``sys.stderr`` until the block ends."""
    reader, writer = os.pipe()
    stream = io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True)
    if loss is Loss.CLOSED:
        stream.close()
    if loss is not Loss.STALLED:
        os.close(reader)
    try:
        with mock.patch.object(sys, "stderr", stream):
            yield
    finally:
        if loss is Loss.STALLED:
            os.close(reader)  # lets go whoever writes
        with contextlib.suppress(OSError):
            stream.close()
