"""Measures what requests take while the service has no other: what slowdowns are counted against."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from orchestrator.cli.replay.outcome import Outcome
from orchestrator.cli.replay.schedule import PlannedRequest, Schedule
from orchestrator.cli.replay.sending import Make, send_one
from orchestrator.cli.replay.slo import IdlePoint
from orchestrator.errors import ServiceError

_ANSWER_TOKENS = 16
# The first request of a length may find caches cold; the faster one counts.
_TRIES = 2


def idle_requests(schedule: Schedule, *, max_context_tokens: int) -> tuple[PlannedRequest, ...]:
    """Returns requests with the least, the median and the greatest length of the schedule's prompts, each once."""
    answer_tokens = min(_ANSWER_TOKENS, max_context_tokens // 2)
    lengths = sorted(min(request.prompt_tokens, max_context_tokens - answer_tokens) for request in schedule.requests)
    chosen = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    first = len(schedule.requests)  # prompts that the schedule does not have
    return tuple(
        PlannedRequest(index=first + place, due_s=0.0, prompt_tokens=length, answer_tokens=answer_tokens)
        for place, length in enumerate(chosen)
    )


async def measure_idle(
    stub: Any, requests: Sequence[PlannedRequest], make: Make, *, timeout_s: float
) -> tuple[IdlePoint, ...]:
    """Sends requests one after the other and returns what each took, in their order.

    Raises:
        ServiceError: one of them was not answered.
    """
    points = []
    for request in requests:
        tries = [await _alone(stub, request, make, number, timeout_s=timeout_s) for number in range(_TRIES)]
        points.append(
            IdlePoint(
                prompt_tokens=request.prompt_tokens,
                ttft_s=min(outcome.token_times_s[0] - outcome.sent_s for outcome in tries),
                tbt_s=min(outcome.tpot_s or 0.0 for outcome in tries),
            )
        )
    return tuple(points)


async def _alone(stub: Any, request: PlannedRequest, make: Make, number: int, *, timeout_s: float) -> Outcome:
    message = make(request)
    message.cache_salt += f" alone {number}"  # so that no try finds the prompt of another
    start_s = time.monotonic()
    outcome = await send_one(stub, request, message, timeout_s=timeout_s, now_s=lambda: time.monotonic() - start_s)
    if outcome.is_stopped:
        raise asyncio.CancelledError
    if not outcome.is_completed:
        raise ServiceError(code=outcome.code, message=f"before the replay, alone: {outcome.detail or 'no answer'}")
    return outcome
