"""Decides which requests of a trace are sent, when, and how long their prompts and answers are. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.cli.replay.trace import BLOCK_TOKENS, TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A run of a prompt's tokens that one hash id stands for.

    Attributes:
        block: the hash id.
        num_tokens: how many of the block's tokens, from its first, the prompt has.
    """

    block: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """A request to send.

    Attributes:
        index: its place in the schedule, from 0.
        due_s: when it is sent, in seconds after the start of the replay.
        prompt_tokens: the length of its prompt, at least 1.
        answer_tokens: the length of its answer, at least 1.
        parts: what its prompt consists of; None for tokens that it shares with no other request.
    """

    index: int
    due_s: float
    prompt_tokens: int
    answer_tokens: int
    parts: tuple[Part, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Says what is sent, and what had to be changed for it.

    Attributes:
        requests: in the order in which they are due.
        num_clipped: how many of them were shortened to fit the context.
        shared_tokens: the prompt tokens in leading blocks that an earlier prompt has too: what a prefix cache finds
            that is large enough and filled at once.
    """

    requests: tuple[PlannedRequest, ...]
    num_clipped: int
    shared_tokens: int


def make_schedule(
    trace: Sequence[TraceRequest],
    *,
    rate: float = 1.0,
    scale: float = 1.0,
    max_context_tokens: int,
    duration_s: float | None = None,
    limit: int | None = None,
) -> Schedule:
    """Returns what to send of a trace, whose requests come in the order of time.

    Args:
        rate: how many times as fast as recorded.
        scale: the factor on the lengths of prompts, blocks and answers.
        max_context_tokens: the most tokens of prompt and answer together, at least 2. What is longer is clipped: prompt
            and answer keep the ratio of their lengths.
        duration_s: how many of the trace's first seconds; None: all.
        limit: how many requests at the most; None: all.
    """
    chosen = [request for request in trace if duration_s is None or request.at_s < duration_s][:limit]
    requests: list[PlannedRequest] = []
    num_clipped = 0
    for index, request in enumerate(chosen):
        wanted = scaled(request.prompt_tokens, scale), scaled(request.answer_tokens, scale)
        prompt_tokens, answer_tokens = clipped(*wanted, max_context_tokens)
        num_clipped += (prompt_tokens, answer_tokens) != wanted
        requests.append(
            PlannedRequest(
                index=index,
                due_s=request.at_s / rate,
                prompt_tokens=prompt_tokens,
                answer_tokens=answer_tokens,
                parts=_parts(request.blocks, prompt_tokens, scale) if request.blocks else None,
            )
        )
    return Schedule(requests=tuple(requests), num_clipped=num_clipped, shared_tokens=_shared_tokens(requests))


def scaled(num_tokens: int, scale: float) -> int:
    """Returns a scaled length, at least 1."""
    return max(1, round(num_tokens * scale))


def clipped(prompt_tokens: int, answer_tokens: int, max_context_tokens: int) -> tuple[int, int]:
    """Returns lengths of prompt and answer that fit the context, in about the same ratio, each at least 1."""
    total = prompt_tokens + answer_tokens
    if total <= max_context_tokens:
        return prompt_tokens, answer_tokens
    kept = min(max(1, prompt_tokens * max_context_tokens // total), max_context_tokens - 1)
    return kept, max_context_tokens - kept


def _parts(blocks: Sequence[int], prompt_tokens: int, scale: float) -> tuple[Part, ...]:
    """Returns what a scaled prompt consists of.

    A block's edges are scaled and rounded, so that it lies at the same positions in every prompt that begins alike.
    """
    edges = [min(prompt_tokens, round(place * BLOCK_TOKENS * scale)) for place in range(len(blocks))] + [prompt_tokens]
    sizes = [end - start for start, end in pairwise(edges)]
    return tuple(Part(block=block, num_tokens=size) for block, size in zip(blocks, sizes, strict=True) if size)


def _shared_tokens(requests: Iterable[PlannedRequest]) -> int:
    """Counts the tokens of the leading parts that an earlier prompt has too, in a tree of all prompts."""
    children: dict[tuple[int, Part], int] = {}
    shared = 0
    for request in requests:
        node = 0
        for part in request.parts or ():
            known = children.get((node, part))
            if known is None:
                known = children[node, part] = len(children) + 1
            else:
                shared += part.num_tokens
            node = known
    return shared
