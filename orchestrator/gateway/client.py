"""Defines who sent a request and what happens to it, whichever surface it came by.

A surface (gRPC, or the OpenAI API over HTTP) makes a ``Client`` for each request and writes the events that the client
is sent.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from orchestrator.gateway.errors import DeadlineExceeded
from orchestrator.telemetry.transfers import KvTransfer
from placement.errors import HeterodyneError


class FinishReason(Enum):
    """Why an answer ended well."""

    STOP = "stop"
    LENGTH = "length"


Outcome = FinishReason | HeterodyneError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """How likely a token was.

    Attributes:
        logprob: the natural logarithm of its probability.
        top: the most likely tokens at its position with theirs, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The request was admitted. The first event of every request that is not refused."""

    request_id: str
    model: str
    prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Echoed:
    """A run of the prompt's tokens, where they were asked for. Comes before every ``Delta``.

    Attributes:
        first_index: the position of the first token in the prompt.
        scores: the scores that are known, by position in ``token_ids``.
    """

    first_index: int
    token_ids: Sequence[int]
    scores: Mapping[int, TokenScore]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceEnd:
    """How a choice ended well.

    Attributes:
        matched_stop: the stop string that ended it, where one did.
    """

    finish_reason: FinishReason
    matched_stop: str | None
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a choice has gained.

    Attributes:
        first_index: the position of the first token in the answer.
        scores: the scores that were asked for, by position in ``token_ids``.
        text: the text that is now certain.
        end: set on the last delta of a choice that ended well.
    """

    choice: int
    first_index: int
    token_ids: Sequence[int]
    scores: Mapping[int, TokenScore]
    text: str
    end: ChoiceEnd | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerTimes:
    """Where the time of an answer went, in seconds since the request arrived. None means not reached.

    Attributes:
        queue_s: until the first choice was first scheduled.
        first_token_s: until the first token of any choice was there.
        per_token_s: the mean time between the later tokens of a choice, over all choices.
    """

    queue_s: float | None
    first_token_s: float | None
    per_token_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The request ended. The last event of every request that was accepted.

    Attributes:
        completion_tokens: of all choices.
        cached_prompt_tokens: prompt tokens found in the prefix cache; None where the prompt was not computed.
        matched_stop: the stop string that ended the only choice, where one did.
        replica: the name of the replica that computed the answer.
        transfer: the transfer of keys and values by which another replica computed the prompt for it; None where it
            computed the prompt itself.
    """

    outcome: Outcome
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int | None
    times: AnswerTimes
    total_s: float
    matched_stop: str | None
    replica: str
    transfer: KvTransfer | None = None


Event = Accepted | Echoed | Delta | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Who sent a request, made when it arrives.

    Attributes:
        timeout_s: how long the request may take from its arrival.
        has_deadline: whether that is what the client wants; else it is the most that the service allows.
        trace: the trace headers (W3C Trace Context) that came with it.
        send: sends an event; returns when there is room for the next one.
        arrived_ns: when the request arrived, in ns since 1970.
        arrived_s: the same on the monotonic clock.
    """

    timeout_s: float
    trace: Mapping[str, str]
    send: Callable[[Event], Awaitable[None]]
    has_deadline: bool = False
    arrived_ns: int = field(default_factory=time.time_ns)
    arrived_s: float = field(default_factory=time.monotonic)

    def age_s(self) -> float:
        """Returns how long ago the request arrived."""
        return time.monotonic() - self.arrived_s

    def remaining_s(self) -> float:
        """Returns how long the request may still take."""
        return max(0.0, self.timeout_s - self.age_s())

    def overdue(self) -> DeadlineExceeded:
        """Returns the error of a request whose time is up."""
        if self.has_deadline:  # some of its time was up when it arrived, so that a number would be another than it set
            return DeadlineExceeded("the deadline passed before the answer was complete")
        return DeadlineExceeded(f"the request took longer than gateway.request_timeout_s = {self.timeout_s:g} allows")
