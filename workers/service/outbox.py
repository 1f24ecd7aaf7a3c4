"""Keeps messages on their way to a gateway, within bounds, so that one that stops reading costs its worker no more."""

import asyncio
from collections import deque

from protos.heterodyne.worker.v1 import worker_pb2 as pb

# What may wait behind the buffers of the connection, some MiB: 20 s of a step every 5 ms, or 30 s of 512 sequences at
# 100 steps a second. As objects, messages of many small outputs take 12 times their bytes: 200 MB in all.
MAX_MESSAGES = 4096
MAX_BYTES = 16 << 20


class Outbox:
    """Keeps messages in order, for one event loop and one reader.

    Args:
        max_messages: the most messages that may wait.
        max_bytes: the most bytes that they may take on the wire together; one message alone may take more.
    """

    def __init__(self, *, max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._messages: deque[tuple[pb.LeadResponse, int]] = deque()
        self._num_bytes = 0
        self._closed = False
        self._changed = asyncio.Event()

    def put(self, message: pb.LeadResponse) -> bool:
        """Keeps a message, or returns False where it is one too many. Do not call it after ``close``."""
        assert not self._closed, message
        size = message.ByteSize()
        is_full = len(self._messages) >= self._max_messages or self._num_bytes + size > self._max_bytes
        if self._messages and is_full:
            return False
        self._messages.append((message, size))
        self._num_bytes += size
        self._changed.set()
        return True

    def close(self) -> None:
        """Ends the input. Messages that wait can still be taken."""
        self._closed = True
        self._changed.set()

    async def take(self) -> pb.LeadResponse | None:
        """Waits for the next message and returns it; None after the last."""
        while not self._messages:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        message, size = self._messages.popleft()
        self._num_bytes -= size
        return message
