"""Hears when a user or a supervisor asks ``serve`` to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Listens to SIGINT and SIGTERM: the first of them asks for a drain, and a Ctrl-C after it cuts the drain short.

    A second SIGTERM does not, as supervisors repeat it, to a process and to its group.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.forced = threading.Event()

    @classmethod
    @contextmanager
    def taken(cls) -> Iterator["StopRequest"]:
        """Takes the signals for the length of the block, after which they are ignored."""
        request = cls()
        request.install()
        try:
            yield request
        finally:
            request.ignore()

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Notes a signal."""
        if number == signal.SIGINT and self.asked.is_set():
            self.forced.set()
        self.asked.set()

    def install(self) -> None:
        """Takes the signals. Ray takes them when it connects, so this is called again after."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def ignore(self) -> None:
        """Ignores the signals from now on.

        The interpreter drops handlers on its way out, where a late signal would spoil the exit code.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
