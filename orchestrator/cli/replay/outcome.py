"""Keeps what became of each request of a replay: when its tokens came, and how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass

OK = "OK"
STOPPED = "STOPPED"
"""How a request ended that was still running when the replay was stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Tells what one request got. Times are seconds after the start of the replay.

    Attributes:
        index: its place in the schedule.
        due_s: when it was to be sent.
        sent_s: when it was sent.
        ended_s: when its last message came, or its error.
        code: ``OK``, ``STOPPED``, or the name of the gRPC status that it failed with.
        detail: the words of the error; empty where there is none.
        token_times_s: when each token of its answer came.
        prompt_tokens: the length of its prompt.
        cached_tokens: how much of the prompt was found in the prefix cache; 0 where it was not answered.
    """

    index: int
    due_s: float
    sent_s: float
    ended_s: float
    code: str
    detail: str = ""
    token_times_s: Sequence[float] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def is_completed(self) -> bool:
        """Whether it got its whole answer, which has at least one token."""
        return self.code == OK and len(self.token_times_s) > 0

    @property
    def is_stopped(self) -> bool:
        """Whether it was running when the replay was stopped."""
        return self.code == STOPPED

    @property
    def ttft_s(self) -> float:
        """The time to its first token, from when it was due."""
        return self.token_times_s[0] - self.due_s

    @property
    def e2e_s(self) -> float:
        """The time to its end, from when it was due."""
        return self.ended_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """The mean time between its tokens; None where it has only one."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
