"""How a user or a supervisor asks ``serve`` to stop."""

import signal
import threading
from types import FrameType


class StopRequest:
    """SIGINT and SIGTERM: the first asks for a drain; a second Ctrl-C cuts it short.

    A second SIGTERM does not: supervisors repeat it, to a process and to its group.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.forced = threading.Event()

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked.is_set():
            self.forced.set()
        self.asked.set()

    def install(self) -> None:
        """Ray sets handlers of its own when it connects, so this is called again after."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def ignore(self) -> None:
        """For the way out: the interpreter resets ``handle`` there, and a late signal would spoil the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
