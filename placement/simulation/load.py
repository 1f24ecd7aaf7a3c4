"""Describes the requests that a simulation serves: of a trace, at random times, or of clients that wait for answers."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

_ZEROS = (0,) * 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request.

    Attributes:
        number: counts the requests from 0; it orders those that come at the same time.
        at_s: when it comes.
        prompt_tokens: tokens of its prompt.
        answer_tokens: tokens of its answer.
        prompt_ids: the tokens of its prompt, where some of them begin other prompts too; otherwise no two begin alike.
    """

    number: int
    prompt_tokens: int
    answer_tokens: int
    at_s: float = 0.0
    prompt_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.prompt_tokens >= 1 and self.answer_tokens >= 1 and self.at_s >= 0.0, self
        assert self.prompt_ids is None or len(self.prompt_ids) == self.prompt_tokens, self

    def tokens(self) -> tuple[int, ...]:
        """Returns the tokens of its prompt."""
        if self.prompt_ids is not None:
            return self.prompt_ids
        rest = self.prompt_tokens - 1
        zeros = _ZEROS[:rest] if rest <= len(_ZEROS) else (0,) * rest
        return (2 * abs(self.number) + (self.number < 0), *zeros)


class Load(Protocol):
    """Says when requests come."""

    def start(self) -> Sequence[Request]:
        """Returns the requests whose time is known from the start."""

    def ended(self, number: int, now_s: float) -> Request | None:
        """Returns the request that comes because another has ended, if one does."""


class OpenLoop:
    """Lets requests come when they come, whatever has become of those before."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = sorted(requests, key=lambda it: (it.at_s, it.number))

    def start(self) -> Sequence[Request]:
        """Returns all requests."""
        return self._requests

    def ended(self, number: int, now_s: float) -> Request | None:
        """Returns nothing, since no request waits for another."""
        return None


class ClosedLoop:
    """Lets so many clients send one request each, and the next when they have their answer.

    Args:
        requests: in the order in which they are sent; their times do not count.
        num_clients: how many are served at a time.
        pause_s: seconds between an answer and the client's next request.
    """

    def __init__(self, requests: Iterable[Request], *, num_clients: int, pause_s: float = 0.0) -> None:
        self._rest = list(requests)[::-1]
        self._num_clients = num_clients
        self._pause_s = pause_s

    def start(self) -> Sequence[Request]:
        """Returns the first request of each client."""
        count = min(self._num_clients, len(self._rest))
        return [replace(self._rest.pop(), at_s=0.0) for _ in range(count)]

    def ended(self, number: int, now_s: float) -> Request | None:
        """Returns the next request of the client whose request has ended, if any is left."""
        return replace(self._rest.pop(), at_s=now_s + self._pause_s) if self._rest else None


def at_random(sizes: Iterable[tuple[int, int]], *, rate: float, seed: int) -> list[Request]:
    """Returns requests of these (prompt, answer) sizes that come independently of each other, ``rate`` in a second."""
    drawn, at_s, requests = random.Random(seed), 0.0, []
    for number, (prompt_tokens, answer_tokens) in enumerate(sizes):
        at_s += drawn.expovariate(rate)
        requests.append(Request(number=number, at_s=at_s, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens))
    return requests


def at_rate(requests: Sequence[Request], rate: float) -> list[Request]:
    """Returns the requests of a trace in the same rhythm, faster or slower, so that ``rate`` come in a second."""
    first_s = min((it.at_s for it in requests), default=0.0)
    span_s = max((it.at_s for it in requests), default=0.0) - first_s
    factor = (len(requests) - 1) / (rate * span_s) if span_s > 0 else 0.0
    return [replace(it, at_s=(it.at_s - first_s) * factor) for it in requests]
