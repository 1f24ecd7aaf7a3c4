"""The timeline: what is remembered, and that the trace made of it is one that Perfetto draws."""

import asyncio
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from orchestrator.cli.app import app
from orchestrator.cli.timeline import trace, trace_events
from orchestrator.cli.timeline_command import fetch_timeline, write_timeline
from orchestrator.errors import ServiceError
from orchestrator.gateway.timeline import MAX_REQUESTS, MAX_STEPS, Timeline
from orchestrator.telemetry.requests import RequestRecord
from placement.errors import InvalidConfig, InvalidRequest
from protos.heterodyne.v1 import admin_pb2, inference_pb2, inference_pb2_grpc
from protos.heterodyne.worker.v1 import worker_pb2
from tests.support.clocks import PATIENCE_S
from tests.support.deploying.deployment import deploy, make_config

S = 1_000_000_000
START_NS = 1_700_000_000 * S
SECRET = "In the beginning of the waters"
# What Perfetto needs of each kind of event.
FIELDS = {
    "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
    "M": {"ph", "name", "pid", "tid", "ts", "args"},
    "C": {"ph", "name", "pid", "tid", "ts", "args"},
}
METADATA = {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}
ROUNDING_US = 0.001


def request(arrived_s: float, total_s: float, **fields: Any) -> admin_pb2.RequestTiming:
    base = {"request_id": "r", "replica": "a", "num_choices": 1, "outcome": "stop"}
    times = {"arrived_ns": START_NS + round(arrived_s * S), "total_s": total_s}
    return admin_pb2.RequestTiming(**base | times | fields)


def step(ended_s: float, duration_s: float, **fields: Any) -> admin_pb2.StepTiming:
    base = {"replica": "a", "step": 1, "num_tokens": 1, "num_decodes": 1}
    return admin_pb2.StepTiming(**base | {"ended_ns": START_NS + round(ended_s * S), "duration_s": duration_s} | fields)


def timeline(requests: Any = (), steps: Any = ()) -> admin_pb2.GetTimelineResponse:
    return admin_pb2.GetTimelineResponse(model="m", requests=requests, steps=steps)


def spans(events: list[dict[str, Any]], category: str) -> list[tuple[Any, ...]]:
    found = [event for event in events if event["ph"] == "X" and event["cat"] == category]
    return [(event["tid"], event["name"], event["ts"], event["dur"]) for event in found]


def check_trace(file: dict[str, Any]) -> None:
    """What the format demands, and that events on a track follow each other or lie within each other."""
    assert set(file) == {"displayTimeUnit", "otherData", "traceEvents"}
    named: dict[str, set[tuple[int, int]]] = defaultdict(set)
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in file["traceEvents"]:
        assert set(event) == FIELDS[event["ph"]], event
        track = (event["pid"], event["tid"])
        assert event["ts"] >= 0 and all(isinstance(number, int) and number > 0 for number in track)
        if event["ph"] == "M":
            assert event["name"] in METADATA and len(event["args"]) == 1
            named[event["name"]].add(track)
        elif event["ph"] == "C":
            assert event["args"] and all(value >= 0 for value in event["args"].values())
        else:
            assert event["dur"] >= 0
            tracks[track].append((event["ts"], event["ts"] + event["dur"]))
    assert all(named[name] >= set(tracks) for name in METADATA)
    for intervals in tracks.values():
        check_nesting(intervals)


def check_nesting(intervals: list[tuple[float, float]]) -> None:
    """In the order of the file: an outer event comes before what lies within it."""
    outer: list[tuple[float, float]] = []
    begun = 0.0
    for start, stop in intervals:
        assert start >= begun - ROUNDING_US, "in the order of their starts"
        begun = start
        while outer and outer[-1][1] <= start + ROUNDING_US:
            outer.pop()
        assert not outer or stop <= outer[-1][1] + ROUNDING_US, "neither after nor within the one before it"
        outer.append((start, stop))


def test_a_request_is_drawn_with_its_phases_inside() -> None:
    whole = request(5, 2.0, request_id="mine", queue_s=0.5, first_token_s=0.75, prompt_tokens=7, completion_tokens=9)
    events = trace_events(timeline([whole]))
    assert spans(events, "request") == [(1, "mine", 0.0, 2e6)]
    assert spans(events, "phase") == [(1, "queue", 0.0, 5e5), (1, "prefill", 5e5, 2.5e5), (1, "decode", 7.5e5, 1.25e6)]
    (args,) = [event["args"] for event in events if event.get("cat") == "request"]
    assert args == {
        "replica": "a", "outcome": "stop", "failed": False, "prompt_tokens": 7, "completion_tokens": 9, "choices": 1,
    }  # fmt: skip
    whole.cached_prompt_tokens = 0
    (args,) = [event["args"] for event in trace_events(timeline([whole])) if event.get("cat") == "request"]
    assert isinstance(args, dict) and args["cached_prompt_tokens"] == 0


@pytest.mark.parametrize(
    ("reached", "phases"),
    [
        ({}, [("queue", 2e6)]),
        ({"queue_s": 0.5}, [("queue", 5e5), ("prefill", 1.5e6)]),
        ({"queue_s": 0.5, "first_token_s": 9.0}, [("queue", 5e5), ("prefill", 1.5e6), ("decode", 0.0)]),
    ],
)
def test_phases_that_were_not_reached_are_left_out(reached: dict[str, float], phases: list[tuple[str, float]]) -> None:
    events = trace_events(timeline([request(0, 2.0, outcome="CANCELLED", failed=True, **reached)]))
    assert [(name, duration) for _, name, _, duration in spans(events, "phase")] == phases


def test_a_prompt_that_another_replica_computed_is_drawn_with_its_transfer() -> None:
    both = {"queue_s": 0.5, "first_token_s": 1.0, "prefill_replica": "b", "prefill_s": 0.3, "exposed_s": 0.1}
    events = trace_events(timeline([request(0.0, 2.0, **both)]))
    phases = [(name, pytest.approx(dur)) for _, name, _, dur in spans(list(events), "phase")]
    assert phases == [("queue", 5e5), ("prefill", 3e5), ("kv_transfer", 2e5), ("decode", 1e6)]


def test_requests_share_tracks_and_none_overlaps_another() -> None:
    # In the order in which they ended; drawn in that of their arrival.
    ended = [request(1, 1, request_id="b"), request(0, 3, request_id="a"), request(2, 2, request_id="c")]
    late = [request(3.5, 1, request_id="d"), request(3.6, 0.1, request_id="e")]
    events = trace_events(timeline(ended + late))
    assert [(track, name) for track, name, *_ in spans(events, "request")] == [
        (1, "a"), (2, "b"), (2, "c"), (1, "d"), (3, "e"),
    ]  # fmt: skip


def test_steps_of_each_replica_are_a_process_of_their_own_with_its_batches() -> None:
    steps = [
        step(1.0, 0.5, step=1, num_tokens=64, num_decodes=0),
        step(1.2, 0.1, replica="b", step=9),
        step(1.5, 0.5, step=2, num_tokens=10, num_decodes=3),
        step(3.0, 0.25, step=3),
    ]
    events = trace_events(timeline(steps=steps))
    names = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}  # type: ignore[index]
    assert names == {"a": 2, "b": 3}
    drawn = [event for event in events if event["pid"] == 2 and event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in drawn] == [
        ("prefill", 0.0, 5e5), ("mixed", 5e5, 5e5), ("decode", 2.25e6, 2.5e5),
    ]  # fmt: skip
    counters = [event for event in events if event["pid"] == 2 and event["ph"] == "C"]
    assert [(event["ts"], event["args"]) for event in counters] == [
        (0.0, {"prefill": 64, "decode": 0}),
        (5e5, {"prefill": 7, "decode": 3}),
        (1e6, {"prefill": 0, "decode": 0}),
        (2.25e6, {"prefill": 0, "decode": 1}),
        (2.5e6, {"prefill": 0, "decode": 0}),
    ]


def test_steps_that_were_heard_of_at_once_are_cut_and_say_how_long_they_took() -> None:
    events = trace_events(timeline(steps=[step(1.0, 0.5), step(1.0, 0.5), step(1.1, 0.5), step(0.9, 0.1)]))
    assert [(start, duration) for _, _, start, duration in spans(events, "step")] == [
        (0.0, 5e5), (5e5, 0.0), (5e5, 1e5), (6e5, 0.0),
    ]  # fmt: skip
    assert [e["args"]["duration_ms"] for e in events if e["ph"] == "X"] == [500.0, 500.0, 500.0, 100.0]  # type: ignore[index]


def test_nothing_is_drawn_of_nothing() -> None:
    assert trace_events(timeline()) == []
    check_trace(trace(timeline()))


seconds = st.floats(0, 100, allow_nan=False)
maybe_seconds = st.none() | seconds


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(
            lambda at, total, queue, first: request(at, total, queue_s=queue, first_token_s=first),
            seconds, seconds, maybe_seconds, maybe_seconds,
        ),
        max_size=30,
    ),
    st.lists(
        st.builds(
            lambda at, took, name, tokens, decodes: step(
                at, took, replica=name, num_tokens=tokens, num_decodes=min(tokens, decodes)
            ),
            seconds, seconds, st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 9),
        ),
        max_size=30,
    ),
)  # fmt: skip
def test_whatever_happened_the_trace_is_sound(
    requests: list[admin_pb2.RequestTiming], steps: list[admin_pb2.StepTiming]
) -> None:
    made = trace(timeline(requests, steps))
    check_trace(json.loads(json.dumps(made, allow_nan=False)))


def record(**fields: Any) -> RequestRecord:
    base: dict[str, Any] = {
        "request_id": "r", "model": "m", "replica": "a", "prompt_tokens": 3, "completion_tokens": 4,
        "arrived_ns": START_NS, "total_s": 2.0, "queue_s": 0.25, "first_token_s": 0.5, "per_token_s": 0.5,
        "outcome": "length", "failed": False, "parent": {}, "num_choices": 2, "cached_prompt_tokens": 1,
    }  # fmt: skip
    return RequestRecord(**base | fields)


def test_what_ended_is_remembered() -> None:
    kept = Timeline(model="m", now_ns=lambda: START_NS + 7)
    kept.finished(record())
    kept.stepped("a", worker_pb2.StepOutput(step=5, duration_s=0.5, num_tokens=8, num_decodes=2))
    message = kept.snapshot().message()
    assert message.model == "m"
    assert list(message.requests) == [
        admin_pb2.RequestTiming(
            request_id="r", replica="a", arrived_ns=START_NS, queue_s=0.25, first_token_s=0.5, total_s=2.0,
            prompt_tokens=3, cached_prompt_tokens=1, completion_tokens=4, num_choices=2, outcome="length",
        )
    ]  # fmt: skip
    assert list(message.steps) == [
        admin_pb2.StepTiming(
            replica="a", step=5, ended_ns=START_NS + 7, duration_s=0.5, num_tokens=8, num_decodes=2
        )
    ]  # fmt: skip


def test_a_phase_that_was_not_reached_is_absent() -> None:
    kept = Timeline(model="m")
    kept.finished(record(queue_s=None, first_token_s=None, cached_prompt_tokens=None))
    (timing,) = kept.snapshot().message().requests
    assert not any(timing.HasField(name) for name in ("queue_s", "first_token_s", "cached_prompt_tokens"))


def test_only_the_latest_are_kept_and_they_fit_one_message() -> None:
    kept = Timeline(model="m")
    for index in range(MAX_REQUESTS + 10):
        kept.finished(record(request_id=f"{index:04}" + "水" * 124))
    output = worker_pb2.StepOutput(duration_s=1.0, num_tokens=2**20, num_decodes=4096)
    for index in range(MAX_STEPS + 20):
        output.step = 2**32 + index
        kept.stepped("replica-1023", output)
    message = kept.snapshot().message()
    assert (len(message.requests), message.forgotten_requests) == (MAX_REQUESTS, 10)
    assert (len(message.steps), message.forgotten_steps) == (MAX_STEPS, 20)
    assert message.requests[0].request_id.startswith("0010") and message.steps[0].step == 2**32 + 20
    assert message.ByteSize() < 4 * 2**20


def test_the_last_seconds_alone_can_be_asked_for() -> None:
    now_ns = START_NS
    kept = Timeline(model="m", now_ns=lambda: now_ns)
    for index in range(5):
        now_ns = START_NS + index * S
        kept.finished(record(request_id=str(index), arrived_ns=now_ns - S, total_s=1.0))
        kept.stepped("a", worker_pb2.StepOutput(step=index))
    message = kept.snapshot(2.0).message()
    assert [item.request_id for item in message.requests] == ["2", "3", "4"]
    assert [item.step for item in message.steps] == [2, 3, 4]


def test_a_snapshot_stays_as_it_is_while_more_is_remembered() -> None:
    kept = Timeline(model="m")
    kept.stepped("a", worker_pb2.StepOutput(step=1, num_tokens=1))
    before = kept.snapshot()
    kept.stepped("a", worker_pb2.StepOutput(step=2, num_tokens=1))
    kept.finished(record())
    message = before.message()
    assert [item.step for item in message.steps] == [1] and not message.requests
    assert (message.forgotten_steps, message.forgotten_requests) == (0, 0)


@pytest.mark.parametrize("last_s", [-1.0, float("nan"), float("inf"), 1e12])
def test_a_span_that_is_none_is_refused(last_s: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Timeline(model="m").snapshot(last_s)
    assert caught.value.field == "last_s"


async def test_a_service_tells_its_timeline_without_any_text(served_checkpoint: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, served_checkpoint, cluster={"ray_address": "local", "workers": [{"count": 2}]})
    output = tmp_path / "trace.json"
    async with deploy(config) as running, grpc.aio.insecure_channel(running.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)

        async def ask(index: int) -> str:
            message = inference_pb2.GenerateRequest(
                prompt=SECRET, max_tokens=5 + index, ignore_eos=True, request_id=f"request {index}"
            )
            return "".join([response.chunk.text async for response in stub.Generate(message)])

        answers = await asyncio.gather(*map(ask, range(6)))
        said = await asyncio.to_thread(write_timeline, running.address, output)
        told = await asyncio.to_thread(fetch_timeline, running.address, last_s=None, timeout_s=PATIENCE_S)
        with pytest.raises(ServiceError, match="INVALID_ARGUMENT: last_s: is out of range"):
            await asyncio.to_thread(write_timeline, running.address, output, last_s=-1.0)
        command = ["timeline", str(tmp_path / "b.json"), "--address", running.address, "--last", "600"]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert result.exit_code == 0 and "6 requests" in result.output
    assert said == f"6 requests and {len(told.steps)} steps in {output}: open it at https://ui.perfetto.dev"
    text = output.read_text()
    assert SECRET not in text and not any(len(answer) > 3 and answer in text for answer in answers)
    check_trace(json.loads(text))
    assert (tmp_path / "b.json").read_text() == text
    assert {item.request_id for item in told.requests} == {f"request {index}" for index in range(6)}
    assert all(item.outcome == "length" and item.replica.startswith("replica-") for item in told.requests)
    for item in told.requests:
        assert 0 <= item.queue_s <= item.first_token_s <= item.total_s
    for replica in ("replica-0", "replica-1"):
        check_steps([item for item in told.steps if item.replica == replica], told, replica)


def check_steps(steps: list[admin_pb2.StepTiming], told: admin_pb2.GetTimelineResponse, replica: str) -> None:
    """The steps of a replica account for every token of its requests, and happened while those were under way."""
    mine = [item for item in told.requests if item.replica == replica]
    assert sum(item.num_decodes for item in steps) == sum(item.completion_tokens - 1 for item in mine)
    assert [item.step for item in steps] == sorted({item.step for item in steps})
    for item in steps:
        assert 0 <= item.num_decodes <= item.num_tokens and item.duration_s > 0
        assert any(
            one.arrived_ns <= item.ended_ns and item.ended_ns - item.duration_s * S <= one.arrived_ns + one.total_s * S
            for one in mine
        )


def test_nothing_to_ask_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ServiceError) as caught:
        write_timeline("127.0.0.1:1", tmp_path / "out.json")
    assert str(caught.value).startswith("UNAVAILABLE: nothing listens at 127.0.0.1:1 (connection refused). Start ")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.cli.timeline_command.fetch_timeline", lambda *_, **__: timeline())
    with pytest.raises(InvalidConfig) as caught:
        write_timeline("h:1", tmp_path / "none" / "out.json")
    assert (caught.value.field, caught.value.problem) == ("OUTPUT.json", "cannot be written: no such file or directory")
