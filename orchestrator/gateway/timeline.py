"""Remembers the latest requests and steps for a timeline, in bounded memory. Never their text."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.telemetry.requests import RequestRecord
from placement.errors import InvalidRequest
from protos.heterodyne.v1 import admin_pb2
from protos.heterodyne.worker.v1 import worker_pb2

# Together below the 4 MB that a gRPC client takes in one message: a request is some 0.1 to 0.6 KB, a step 50 bytes.
MAX_REQUESTS = 4096
MAX_STEPS = 16384
_MAX_LAST_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSnapshot:
    """Holds what was remembered at one moment. May be read on any thread.

    Attributes:
        since_ns: what ended before this is left out, in ns since 1970.
        num_requests: how many requests ever ended, with those that are forgotten; ``num_steps`` likewise.
    """

    model: str
    since_ns: int
    requests: tuple[admin_pb2.RequestTiming, ...]
    steps: tuple[admin_pb2.StepTiming, ...]
    num_requests: int
    num_steps: int

    def message(self) -> admin_pb2.GetTimelineResponse:
        """Returns the snapshot as a message. This takes some 10 ms where the memory is full."""
        since_ns = self.since_ns
        return admin_pb2.GetTimelineResponse(
            model=self.model,
            requests=[item for item in self.requests if item.arrived_ns + round(item.total_s * 1e9) >= since_ns],
            steps=[item for item in self.steps if item.ended_ns >= since_ns],
            forgotten_requests=self.num_requests - len(self.requests),
            forgotten_steps=self.num_steps - len(self.steps),
        )


class Timeline:
    """Remembers the latest requests that ended and steps that were run. Lives on one event loop.

    Args:
        now_ns: returns the nanoseconds since 1970, on the clock of ``RequestRecord.arrived_ns``.
    """

    def __init__(self, *, model: str, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._model = model
        self._now_ns = now_ns
        self._requests: deque[admin_pb2.RequestTiming] = deque(maxlen=MAX_REQUESTS)
        self._steps: deque[admin_pb2.StepTiming] = deque(maxlen=MAX_STEPS)
        self._num_requests = 0
        self._num_steps = 0

    def finished(self, record: RequestRecord) -> None:
        """Remembers an accepted request that ended."""
        self._num_requests += 1
        transfer = None if record.transfer is None or record.transfer.problem else record.transfer
        self._requests.append(
            admin_pb2.RequestTiming(
                request_id=record.request_id,
                replica=record.replica,
                arrived_ns=record.arrived_ns,
                queue_s=record.queue_s,
                first_token_s=record.first_token_s,
                total_s=record.total_s,
                prompt_tokens=record.prompt_tokens,
                cached_prompt_tokens=record.cached_prompt_tokens,
                completion_tokens=record.completion_tokens,
                num_choices=record.num_choices,
                outcome=record.outcome,
                failed=record.failed,
                prefill_replica=None if transfer is None else transfer.prefill,
                prefill_s=None if transfer is None else transfer.prefill_s,
                exposed_s=None if transfer is None else transfer.exposed_s,
            )
        )

    def stepped(self, replica: str, step: worker_pb2.StepOutput) -> None:
        """Remembers a step that a replica finished."""
        self._num_steps += 1
        self._steps.append(
            admin_pb2.StepTiming(
                replica=replica,
                step=step.step,
                ended_ns=self._now_ns(),
                duration_s=step.duration_s,
                num_tokens=step.num_tokens,
                num_decodes=step.num_decodes,
            )
        )

    def snapshot(self, last_s: float | None = None) -> TimelineSnapshot:
        """Returns everything that is remembered, or what of it ended within the last ``last_s`` seconds.

        Raises:
            InvalidRequest: ``last_s`` is no length of time.
        """
        return TimelineSnapshot(
            model=self._model,
            since_ns=0 if last_s is None else self._now_ns() - _nanoseconds(last_s),
            requests=tuple(self._requests),
            steps=tuple(self._steps),
            num_requests=self._num_requests,
            num_steps=self._num_steps,
        )


def _nanoseconds(last_s: float) -> int:
    if not 0.0 <= last_s <= _MAX_LAST_S:
        raise InvalidRequest(
            field="last_s", value=last_s, problem="is out of range", fix=f"Use 0 to {_MAX_LAST_S:g} seconds."
        )
    return round(last_s * 1e9)
