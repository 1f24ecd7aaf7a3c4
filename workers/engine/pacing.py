"""Decides when to plan the next step: early enough that the device never waits, late enough that newcomers join it."""

# Weight of the newest sample in the running mean of the time that preparing takes.
_NEW = 0.25
# Beyond twice the mean time to prepare: the thread has to wake up, and the estimate is never exact.
_MARGIN_S = 0.0005


class Pace:
    """Predicts the end of the step that executes.

    It expects a step to take as long as the last one with as many tokens, and no time where there was none.
    """

    def __init__(self) -> None:
        self._durations_s: dict[int, float] = {}
        self._prepare_s = 0.001
        self._executing: list[int] = []  # tokens of the steps dispatched, the executing one first
        self._began_s = 0.0

    def prepared(self, *, num_tokens: int, took_s: float, now_s: float) -> None:
        """Notes that a step of ``num_tokens`` was dispatched at ``now_s``, and that preparing it took ``took_s``."""
        self._prepare_s += _NEW * (took_s - self._prepare_s)
        if not self._executing:
            self._began_s = now_s
        self._executing.append(num_tokens)

    def executed(self, *, num_tokens: int, took_s: float, now_s: float) -> None:
        """Notes that the oldest step ended, at ``now_s`` at the latest, after ``took_s``, and that the next began."""
        self._executing.pop(0)
        self._durations_s[num_tokens] = took_s
        self._began_s = now_s

    def lost(self) -> None:
        """Notes that the steps on their way do not end any more."""
        self._executing.clear()

    def slack_s(self, now_s: float) -> float:
        """Returns for how many seconds planning the next step can still wait."""
        if not self._executing:
            return 0.0
        expected_s = self._durations_s.get(self._executing[0], 0.0)
        return max(0.0, self._began_s + expected_s - 2 * self._prepare_s - _MARGIN_S - now_s)
