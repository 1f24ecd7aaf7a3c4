"""Keeps virtual time: what is to happen is done in order of its time, and in the order of its making at equal times."""

from collections.abc import Callable
from heapq import heappop, heappush

Action = Callable[[], None]


class VirtualClock:
    """Does one thing after the other, at the time that each is due. Nothing else makes time pass.

    Attributes:
        now_s: the time, in seconds since the start.
        num_actions: how many actions were done so far.
    """

    __slots__ = ("_due", "_made", "now_s", "num_actions")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_actions = 0
        self._due: list[tuple[float, int, Action]] = []
        self._made = 0

    def at(self, when_s: float, action: Action) -> None:
        """Has ``action`` done at ``when_s``, which is not past."""
        assert when_s >= self.now_s, (when_s, self.now_s)
        self._made += 1
        heappush(self._due, (when_s, self._made, action))

    def after(self, wait_s: float, action: Action) -> None:
        """Has ``action`` done in ``wait_s`` seconds."""
        self.at(self.now_s + wait_s, action)

    def run(self, *, until_s: float = float("inf")) -> None:
        """Does all that is due up to ``until_s``, and what that brings about, until nothing is left."""
        due = self._due
        while due and due[0][0] <= until_s:
            self.now_s, _, action = heappop(due)
            self.num_actions += 1
            action()
