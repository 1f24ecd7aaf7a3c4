"""Defines what all answers have in common: how they are headed, what was used, and who writes them. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.gateway.client import Event, Finished


class Answering(Protocol):
    """Writes the answer of one HTTP request, which may be the answers of several prompts.

    Attributes:
        is_stream: whether what ``take`` returns is sent at once, one server-sent event for each object.
    """

    is_stream: bool

    def take(self, prompt: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Takes the next event of a prompt's answer; returns the objects that are sent of it."""

    def end(self) -> Sequence[Mapping[str, Any]]:
        """Returns the last objects, once all answers are complete: of an answer in one piece this is the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Holds what stands at the top of every object of an answer.

    Attributes:
        created_s: when the request came, in seconds since 1970.
    """

    id: str
    created_s: int
    model: str

    def of(self, kind: str) -> dict[str, Any]:
        """Returns the head of an object of this kind."""
        return {"id": self.id, "object": kind, "created": self.created_s, "model": self.model}


def usage(finished: Iterable[Finished]) -> dict[str, Any]:
    """Returns what all prompts and answers used, in tokens."""
    all_finished = tuple(finished)
    prompt_tokens = sum(each.prompt_tokens for each in all_finished)
    completion_tokens = sum(each.completion_tokens for each in all_finished)
    cached = [each.cached_prompt_tokens for each in all_finished if each.cached_prompt_tokens is not None]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(cached)} if cached else None,
    }
