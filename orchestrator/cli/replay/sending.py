"""Sends the requests of a schedule over gRPC when they are due, whatever is still running, and notes what comes."""

import asyncio
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from orchestrator.cli.client import AnswerReader
from orchestrator.cli.replay.outcome import OK, STOPPED, Outcome
from orchestrator.cli.replay.schedule import PlannedRequest, Schedule
from orchestrator.errors import ServiceError
from protos.heterodyne.v1 import inference_pb2 as pb

Make = Callable[[PlannedRequest], pb.GenerateRequest]
"""Makes the message of a request."""
NowS = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a replay is. Counts of requests."""

    num_planned: int
    num_sent: int
    num_running: int
    num_completed: int
    num_failed: int


class Sender:
    """Sends the requests of one schedule.

    Args:
        stub: the service's asynchronous stub.
        timeout_s: the deadline of each request, from when it is sent.
        max_in_flight: how many requests may run at once. The next one waits for one of them to end, and so do all that
            are due after it; how long they do is seen in how late they are.
        now_s: a clock that never goes back.
    """

    def __init__(
        self,
        stub: Any,
        schedule: Schedule,
        make: Make,
        *,
        timeout_s: float,
        max_in_flight: int,
        now_s: NowS = time.monotonic,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._stub = stub
        self._schedule = schedule
        self._make = make
        self._timeout_s = timeout_s
        self._room = asyncio.Semaphore(max_in_flight)
        self._now_s = now_s
        self._start_s = now_s()
        self._num_sent = 0
        self._num_completed = 0

    async def run(self) -> bool:
        """Sends all requests and waits for their ends. Returns False where it was cancelled, which ends all that run.

        Whoever cancels the task that runs this gets the outcomes all the same.
        """
        self._start_s = self._now_s()
        try:
            async with asyncio.TaskGroup() as running:
                for request in self._schedule.requests:
                    message = self._make(request)
                    await asyncio.sleep(self._start_s + request.due_s - self._now_s())
                    await self._room.acquire()
                    running.create_task(self._send(request, message))
        except asyncio.CancelledError:
            return False
        return True

    async def _send(self, request: PlannedRequest, message: pb.GenerateRequest) -> None:
        self._num_sent += 1
        try:
            outcome = await send_one(
                self._stub,
                request,
                message,
                timeout_s=self._timeout_s,
                now_s=lambda: self._now_s() - self._start_s,
            )
        finally:
            self._room.release()
        self.outcomes.append(outcome)
        self._num_completed += outcome.is_completed

    def progress(self) -> Progress:
        """Returns how far it is."""
        num_ended = len(self.outcomes)
        return Progress(
            num_planned=len(self._schedule.requests),
            num_sent=self._num_sent,
            num_running=self._num_sent - num_ended,
            num_completed=self._num_completed,
            num_failed=num_ended - self._num_completed,
        )


async def send_one(
    stub: Any, request: PlannedRequest, message: pb.GenerateRequest, *, timeout_s: float, now_s: NowS
) -> Outcome:
    """Sends one request and returns what it got, whether it is answered, fails, or is cancelled with its task.

    Args:
        now_s: the seconds since the start of the replay.
    """
    sent_s = now_s()
    times, reader = array("d"), AnswerReader(message)
    code, detail, cached_tokens = OK, "", 0
    call = stub.Generate(message, timeout=timeout_s)
    try:
        async for response in call:
            came_s = now_s()
            reader.take(response)
            times.extend([came_s] * len(response.chunk.tokens))
        cached_tokens = reader.result().finished.usage.cached_prompt_tokens
    except grpc.aio.AioRpcError as error:
        code, detail = error.code().name, error.details() or ""
    except ServiceError as error:
        code, detail = error.code, error.message
    except asyncio.CancelledError:
        code = STOPPED
    finally:
        call.cancel()
    return Outcome(
        index=request.index,
        due_s=request.due_s,
        sent_s=sent_s,
        ended_s=now_s(),
        code=code,
        detail=detail,
        token_times_s=times,
        prompt_tokens=request.prompt_tokens,
        cached_tokens=cached_tokens,
    )
