"""Writes the timeline as a trace in Chrome's Trace Event Format (JSON), which ui.perfetto.dev opens.

The process ``requests`` has a track for each request that was under way at once, and in it the request with its phases
inside. Each replica is a process too, with its steps on one track and the tokens of their batches as a counter. The
format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from protos.heterodyne.v1 import admin_pb2

Event = dict[str, object]

_REQUESTS_PID = 1
_STEPS_TID = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Track:
    """The track that events are drawn on, and the moment at which the trace begins (ns since 1970)."""

    pid: int
    tid: int
    origin_ns: int

    def us(self, at_ns: int) -> float:
        return (at_ns - self.origin_ns) / 1000

    def span(self, name: str, category: str, start_ns: int, stop_ns: int, args: dict[str, object]) -> Event:
        """Returns an event with a beginning and a duration."""
        return {
            "ph": "X", "name": name, "cat": category, "pid": self.pid, "tid": self.tid,
            "ts": self.us(start_ns), "dur": (stop_ns - start_ns) / 1000, "args": args,
        }  # fmt: skip

    def counter(self, name: str, at_ns: int, values: dict[str, object]) -> Event:
        return {"ph": "C", "name": name, "pid": self.pid, "tid": self.tid, "ts": self.us(at_ns), "args": values}

    def named(self, process: str, thread: str) -> list[Event]:
        """Returns the metadata that names process and thread, and shows them in the order of their numbers."""
        names: list[tuple[str, str, object]] = [
            ("process_name", "name", process), ("process_sort_index", "sort_index", self.pid),
            ("thread_name", "name", thread), ("thread_sort_index", "sort_index", self.tid),
        ]  # fmt: skip
        return [
            {"ph": "M", "name": name, "pid": self.pid, "tid": self.tid, "ts": 0, "args": {key: value}}
            for name, key, value in names
        ]


def trace(timeline: admin_pb2.GetTimelineResponse) -> dict[str, object]:
    """Returns the whole file, to be written as JSON."""
    other = {
        "model": timeline.model,
        "began_ns": str(_origin_ns(timeline)),
        "forgotten_requests": str(timeline.forgotten_requests),
        "forgotten_steps": str(timeline.forgotten_steps),
    }
    return {"displayTimeUnit": "ms", "otherData": other, "traceEvents": trace_events(timeline)}


def trace_events(timeline: admin_pb2.GetTimelineResponse) -> list[Event]:
    """Returns the events, with times in microseconds from the earliest. Those of a track follow or contain each other.

    A step cannot end after the gateway heard of it, nor begin before the one before it was heard of: where several
    were heard of at once they are drawn as short as that makes them, and ``duration_ms`` says how long they took.
    """
    origin_ns = _origin_ns(timeline)
    events = list(_request_events(timeline.requests, origin_ns))
    replicas = sorted({step.replica for step in timeline.steps})
    for pid, replica in enumerate(replicas, start=_REQUESTS_PID + 1):
        track = _Track(pid=pid, tid=_STEPS_TID, origin_ns=origin_ns)
        events += track.named(replica, "steps")
        events += _step_events((step for step in timeline.steps if step.replica == replica), track)
    return events


def _origin_ns(timeline: admin_pb2.GetTimelineResponse) -> int:
    starts = [request.arrived_ns for request in timeline.requests]
    starts += [step.ended_ns - _ns(step.duration_s) for step in timeline.steps]
    return min(starts, default=0)


def _ns(seconds: float) -> int:
    return round(max(0.0, seconds) * 1e9)


def _request_events(requests: Iterable[admin_pb2.RequestTiming], origin_ns: int) -> Iterator[Event]:
    """Draws each request on the first track that is free when it arrives."""
    free_ns: list[int] = []
    for request in sorted(requests, key=lambda request: request.arrived_ns):
        index = next((i for i, end_ns in enumerate(free_ns) if end_ns <= request.arrived_ns), len(free_ns))
        track = _Track(pid=_REQUESTS_PID, tid=index + 1, origin_ns=origin_ns)
        if index == len(free_ns):
            free_ns.append(0)
            yield from track.named("requests", f"track {track.tid}")
        free_ns[index] = request.arrived_ns + _ns(request.total_s)
        yield from _one_request(request, track)


def _one_request(request: admin_pb2.RequestTiming, track: _Track) -> Iterator[Event]:
    """Draws a request, and within it queue, prefill and decode, without those that were not reached."""
    start_ns, stop_ns = request.arrived_ns, request.arrived_ns + _ns(request.total_s)
    args: dict[str, object] = {
        "replica": request.replica,
        "outcome": request.outcome,
        "failed": request.failed,
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "choices": request.num_choices,
    }
    if request.HasField("cached_prompt_tokens"):
        args["cached_prompt_tokens"] = request.cached_prompt_tokens
    yield track.span(request.request_id, "request", start_ns, stop_ns, args)
    # A phase that has no end of its own lasts until the request's.
    queued_ns = min(stop_ns, start_ns + _ns(request.queue_s)) if request.HasField("queue_s") else stop_ns
    first_ns = min(stop_ns, start_ns + _ns(request.first_token_s)) if request.HasField("first_token_s") else stop_ns
    first_ns = max(queued_ns, first_ns)
    yield track.span("queue", "phase", start_ns, queued_ns, {})
    if request.HasField("prefill_replica"):
        sent_ns = min(first_ns, queued_ns + _ns(request.prefill_s))
        yield track.span("prefill", "phase", queued_ns, sent_ns, {"replica": request.prefill_replica})
        yield track.span("kv_transfer", "phase", sent_ns, first_ns, {"exposed_s": request.exposed_s})
    elif request.HasField("queue_s"):
        yield track.span("prefill", "phase", queued_ns, first_ns, {})
    if request.HasField("first_token_s"):
        yield track.span("decode", "phase", first_ns, stop_ns, {})


def _step_events(steps: Iterable[admin_pb2.StepTiming], track: _Track) -> Iterator[Event]:
    """Draws the steps of a replica, and how many tokens it computes at each moment."""
    before_ns: int | None = None
    for step in steps:
        # Not before the last one, should the clock have been set back.
        stop_ns = step.ended_ns if before_ns is None else max(before_ns, step.ended_ns)
        start_ns = step.ended_ns - _ns(step.duration_s)
        if before_ns is not None and start_ns > before_ns:
            yield _batch_tokens(track, before_ns, 0, 0)
        start_ns = start_ns if before_ns is None else max(before_ns, start_ns)
        args: dict[str, object] = {
            "step": step.step,
            "num_tokens": step.num_tokens,
            "num_decodes": step.num_decodes,
            "duration_ms": step.duration_s * 1e3,
        }
        yield track.span(_kind(step), "step", start_ns, stop_ns, args)
        yield _batch_tokens(track, start_ns, step.num_tokens - step.num_decodes, step.num_decodes)
        before_ns = stop_ns
    if before_ns is not None:
        yield _batch_tokens(track, before_ns, 0, 0)


def _batch_tokens(track: _Track, at_ns: int, num_prefill: int, num_decode: int) -> Event:
    return track.counter("batch tokens", at_ns, {"prefill": num_prefill, "decode": num_decode})


def _kind(step: admin_pb2.StepTiming) -> str:
    """Returns the name of a step, by which Perfetto colours it."""
    if step.num_decodes == step.num_tokens:
        return "decode"
    return "mixed" if step.num_decodes else "prefill"
