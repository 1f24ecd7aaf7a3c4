"""Decides how long a step may take before a replica counts as stalled: a slow machine is not a broken one."""

from dataclasses import dataclass, replace

from placement.measured.step_times import seconds

FACTOR = 10
"""How many times the longest step a step may take. Steps of one replica differ: long contexts, a busy machine or
memory that is read back from a disk make one several times as long as the longest before. A rank that hangs is found
by this alone, and one that is dead or cut off by its missing heartbeat, long before."""

WINDOW_STEPS = 500
"""How many steps the longest is remembered for at least; it is forgotten after twice as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a step of a replica may take, which follows from how long its steps take.

    Attributes:
        floor_s: seconds that every step may take: ``gateway.stall_timeout_s``.
        expected_s: seconds that the longest step is expected to take by what was measured at the start; 0: not known.
        recent_s: seconds that the longest of the last ``num_recent`` steps took.
        before_s: seconds that the longest of the ``WINDOW_STEPS`` steps before those took.
    """

    floor_s: float
    expected_s: float = 0.0
    recent_s: float = 0.0
    before_s: float = 0.0
    num_recent: int = 0

    @property
    def longest_s(self) -> float:
        """Returns the seconds of the longest step that was seen of late or is expected; 0 where neither is known."""
        return max(self.seen_s, self.expected_s)

    @property
    def seen_s(self) -> float:
        """Returns the seconds of the longest step that was seen of late."""
        return max(self.recent_s, self.before_s)

    @property
    def limit_s(self) -> float:
        """Returns the seconds without a finished step after which the replica counts as stalled."""
        return max(self.floor_s, FACTOR * self.longest_s)

    @property
    def rank_limit_s(self) -> float:
        """Returns the seconds that a rank may wait within a step for another that is alive.

        It is less than ``limit_s`` by a tenth, which is no less than the longest step. So a rank that hangs is named by
        those that wait for it, at whatever part of the step they began to wait, before the gateway gives the replica
        up, and never sooner than a step before that.
        """
        return self.limit_s * (1 - 1 / FACTOR)

    def expecting(self, expected_s: float) -> "Patience":
        """Returns the patience where the longest step is expected to take ``expected_s``."""
        return replace(self, expected_s=expected_s)

    def after(self, duration_s: float) -> "Patience":
        """Returns the patience after a step that took ``duration_s``."""
        if self.num_recent < WINDOW_STEPS:
            return replace(self, recent_s=max(self.recent_s, duration_s), num_recent=self.num_recent + 1)
        return replace(self, before_s=self.recent_s, recent_s=duration_s, num_recent=1)

    def stall_words(self) -> str:
        """Says that no step was finished for ``limit_s``, and how long steps take otherwise."""
        stalled = f"no step finished for {seconds(self.limit_s)} s"
        if self.seen_s > 0 and self.seen_s >= self.expected_s:
            return f"{stalled}, where the longest of late took {seconds(self.seen_s)} s"
        if self.expected_s > 0:
            return f"{stalled}, where the longest was expected to take {seconds(self.expected_s)} s"
        return stalled
