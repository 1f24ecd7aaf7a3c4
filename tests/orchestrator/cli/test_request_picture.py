"""The picture of one request: who has a lane in it, and what stands there."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from orchestrator.cli.app import app
from orchestrator.cli.request_picture import chosen_request, lanes, request_svg, ticks
from orchestrator.errors import ServiceError
from protos.heterodyne.v1 import admin_pb2

S = 1_000_000_000
START_NS = 1_700_000_000 * S


def request(**fields: Any) -> admin_pb2.RequestTiming:
    base = {"request_id": "r", "replica": "answers", "arrived_ns": START_NS, "queue_s": 0.5, "total_s": 4.0}
    return admin_pb2.RequestTiming(**base | {"first_token_s": 2.0} | fields)


def split() -> admin_pb2.RequestTiming:
    return request(prefill_replica="prompts", prefill_s=1.0, exposed_s=0.25)


def step(replica: str, ended_s: float, duration_s: float, **fields: Any) -> admin_pb2.StepTiming:
    ended_ns = START_NS + round(ended_s * S)
    base = {"num_tokens": 1, "num_decodes": 1}
    return admin_pb2.StepTiming(replica=replica, ended_ns=ended_ns, duration_s=duration_s, **base | fields)


STEPS = (
    step("prompts", -1.0, 0.5),  # before it arrived
    step("prompts", 1.0, 0.5, num_tokens=64, num_decodes=0),
    step("prompts", 1.5, 0.5, num_tokens=9, num_decodes=0),
    step("answers", 2.0, 0.25, num_tokens=3, num_decodes=2),
    step("answers", 2.1, 0.2),
    step("answers", 5.0, 0.5),  # after it ended
)


def rank(number: int, **fields: Any) -> admin_pb2.RankStatus:
    base = {"rank": number, "node": f"host-{number}", "first_layer": 0, "last_layer": 8}
    return admin_pb2.RankStatus(**base | fields)


def status() -> admin_pb2.GetStatusResponse:
    prompts = [rank(0, worker="fast", token_share=0.69), rank(1, token_share=0.31)]
    answers = [rank(0, num_kv_heads=3, num_ffn_columns=75), rank(1, num_kv_heads=1, num_ffn_columns=25)]
    return admin_pb2.GetStatusResponse(
        replicas=[
            admin_pb2.ReplicaStatus(name="prompts", ranks=prompts),
            admin_pb2.ReplicaStatus(name="answers", ranks=answers),
        ]
    )


def timeline(*requests: admin_pb2.RequestTiming) -> admin_pb2.GetTimelineResponse:
    return admin_pb2.GetTimelineResponse(model="m", requests=requests, steps=STEPS)


def test_everybody_who_computed_the_request_has_a_lane_that_says_what_part_was_its_own() -> None:
    drawn = lanes(split(), timeline(), status())
    assert [(lane.who, lane.part) for lane in drawn[1:]] == [
        ("fast on host-0", "prompts rank 0, 69% of the tokens"),
        ("host-1", "prompts rank 1, 31% of the tokens"),
        ("keys and values", "prompts to answers"),
        ("host-0", "answers rank 0, KV heads 3 of 4, 75% of FFN"),
        ("host-1", "answers rank 1, KV heads 1 of 4, 25% of FFN"),
    ]


def test_steps_stand_in_the_lanes_of_all_ranks_of_their_replica_one_after_the_other() -> None:
    drawn = lanes(split(), timeline(), status())
    found = [[(bar.kind, bar.start_s, bar.stop_s) for bar in lane.bars] for lane in drawn]
    assert found[1] == found[2] == [("prefill", 0.5, 1.0), ("prefill", 1.0, 1.5)]
    approx = pytest.approx
    assert found[4] == found[5] == [("mixed", approx(1.75), approx(2.0)), ("decode", approx(2.0), approx(2.1))]


def test_the_transfer_is_drawn_beside_the_prompt_and_apart_where_it_is_not_hidden() -> None:
    hidden, exposed = lanes(split(), timeline(), status())[3].bars
    assert (hidden.kind, hidden.start_s, hidden.stop_s) == ("kv_transfer", 0.5, 1.5)
    assert (exposed.kind, exposed.start_s, exposed.stop_s) == ("exposed", 1.5, 1.75)
    assert exposed.words == "250.0 ms not hidden"


def test_a_request_that_one_replica_computed_has_no_transfer() -> None:
    drawn = lanes(request(), timeline(), status())
    assert [lane.who for lane in drawn] == ["gateway", "host-0", "host-1"]
    assert [bar.stop_s for bar in drawn[0].bars] == [0.5]


def test_stages_say_their_layers() -> None:
    stages = [rank(0, last_layer=5, num_kv_heads=4), rank(1, first_layer=5, num_kv_heads=4)]
    replica = admin_pb2.ReplicaStatus(name="answers", ranks=stages)
    drawn = lanes(request(), timeline(), admin_pb2.GetStatusResponse(replicas=[replica]))
    assert [lane.part for lane in drawn[1:]] == ["answers rank 0, layers 0 to 4", "answers rank 1, layers 5 to 7"]


def test_a_replica_that_is_known_no_longer_has_one_lane() -> None:
    drawn = lanes(split(), timeline(), admin_pb2.GetStatusResponse())
    assert [lane.who for lane in drawn] == ["gateway", "prompts", "keys and values", "answers"]


def test_the_last_request_is_drawn_unless_another_is_asked_for() -> None:
    held = timeline(request(request_id="first"), request(request_id="last"))
    assert chosen_request(held).request_id == "last"
    assert chosen_request(held, "first").request_id == "first"
    with pytest.raises(ServiceError, match="no request 'other' that has ended"):
        chosen_request(held, "other")
    with pytest.raises(ServiceError, match="no request that has ended"):
        chosen_request(timeline())


def test_the_picture_is_an_svg_with_all_lanes() -> None:
    root = ElementTree.fromstring(request_svg(timeline(split()), status()))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"fast on host-0", "keys and values", "250.0 ms not hidden", "0 ms", "4000 ms"} <= set(texts) | {
        (element.text or "").partition(" (")[0] for element in root.iter("{http://www.w3.org/2000/svg}title")
    }


@given(st.floats(0.0, 1e5))
def test_ticks_are_few_and_begin_at_0(total_s: float) -> None:
    found = ticks(total_s)
    assert found[0] == 0.0 and 1 <= len(found) <= 11 and found[-1] <= total_s * (1 + 1e-9) + 1e-6


def test_a_request_is_chosen_for_a_picture_only(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["timeline", str(tmp_path / "out.json"), "--request", "r"])
    assert result.exit_code == 1 and "--svg" in result.stderr
