"""The command ``status``: once and again, as a table, as lines and as JSON."""

import io
import json
from collections.abc import Callable
from typing import Any, cast

import pytest
from rich.console import Console

from orchestrator.cli.render import print_status, status_lines
from orchestrator.cli.status_command import show_status, watch_status
from orchestrator.cli.status_document import status_document
from orchestrator.errors import ServiceError
from placement.serving.routing.binding import WaitReason
from placement.serving.routing.choice import RouteKind
from protos.heterodyne.v1 import admin_pb2


def status(**load: Any) -> admin_pb2.GetStatusResponse:
    rank = admin_pb2.RankStatus(rank=1, worker="big", node="host-1", device="cpu", weight_bytes=100, num_kv_heads=0)
    figures = admin_pb2.ReplicaLoad(num_waiting=0, free_blocks=3, total_blocks=4, **load)
    replica = admin_pb2.ReplicaStatus(
        name="replica-0", state=admin_pb2.REPLICA_STATE_READY, epoch=3, ranks=[rank], load=figures
    )
    return admin_pb2.GetStatusResponse(model="demo", context_tokens=2048, model_context_tokens=4096, replicas=[replica])


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)


def output(shown: Console) -> str:
    return cast(io.StringIO, shown.file).getvalue()


def test_json_has_what_is_known_and_no_more() -> None:
    document = status_document(status(generated_tokens_per_s=0.0))
    (replica,) = document["replicas"]
    assert (document["context_tokens"], document["model_context_tokens"]) == (2048, 4096)
    assert replica["state"] == "READY" and "cause" not in replica
    load = replica["load"]
    assert (load["waiting"], load["kv_cache_usage"], load["generated_tokens_per_s"]) == (0, 0.25, 0.0)
    assert not load.keys() & {"prompt_tokens_per_s", "prefix_cache_hit_rate"}
    (rank,) = replica["ranks"]
    assert rank == {
        "rank": 1, "worker": "big", "node": "host-1", "device": "cpu", "weight_bytes": 100, "loaded_bytes": 0,
        "num_kv_heads": 0,
    }  # fmt: skip


def test_what_was_measured_is_numbers_too() -> None:
    measured = status()
    rank = measured.replicas[0].ranks[0]
    rank.sums.add(num_bytes=1024, algorithm="direct", duration_s=0.0005)
    rank.exchange.pairs_per_s.extend([3.0, 4.0])
    first, *_, exchange = status_document(measured)["measured"]
    assert first == {
        "event": "sum", "replica": "replica-0", "stage": 0, "num_bytes": 1024, "algorithm": "direct",
        "duration_s": 0.0005,
    }  # fmt: skip
    assert exchange["pairs_per_s"] == [3, 4]


def test_json_is_one_document_even_on_a_terminal() -> None:
    shown = console(terminal=True)
    show_status(shown, "host:1", as_json=True, fetch=lambda _: status())
    assert json.loads(output(shown))["model"] == "demo"


def test_off_a_terminal_it_is_lines_that_scripts_look_for() -> None:
    shown = console()
    show_status(shown, "host:1", as_json=False, fetch=lambda _: status())
    assert "replica=replica-0 state=READY epoch=3 rank=1 node=host-1 worker=big" in output(shown)


def stopped_after(times: int) -> Callable[[float], None]:
    """A sleep that is interrupted, as by Ctrl-C, when it is called for that time."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert seconds == 2.5
        if len(slept) == times:
            raise KeyboardInterrupt

    return sleep


@pytest.mark.parametrize("terminal", [False, True])
def test_watching_shows_it_again_and_again_until_ctrl_c(terminal: bool) -> None:
    shown = console(terminal=terminal)
    watch_status(shown, "host:1", every_s=2.5, as_json=False, fetch=lambda _: status(), sleep=stopped_after(3))
    assert output(shown).count("replica-0") >= 3


def test_watched_json_is_a_document_a_line() -> None:
    shown = console(terminal=True)
    watch_status(shown, "host:1", every_s=2.5, as_json=True, fetch=lambda _: status(), sleep=stopped_after(2))
    assert [json.loads(line)["model"] for line in output(shown).splitlines()] == ["demo", "demo"]


@pytest.mark.parametrize("terminal", [False, True])
def test_watching_ends_with_the_error_of_a_service_that_is_gone(terminal: bool) -> None:
    def gone(address: str) -> admin_pb2.GetStatusResponse:
        raise ServiceError(code="UNAVAILABLE", message=f"nothing answers at {address}")

    with pytest.raises(ServiceError, match="host:1"):
        watch_status(console(terminal=terminal), "host:1", every_s=1.0, as_json=False, fetch=gone)


def test_what_waits_for_a_replica_and_where_requests_went_is_said_in_words_where_there_is_any() -> None:
    known, before, after = status(), console(terminal=True), console(terminal=True)
    print_status(before, known)
    assert "requests" not in output(before)
    assert all(line.startswith(("event=gateway ", "event=rank ")) for line in status_lines(known))
    for reason in WaitReason:
        known.gateway.waiting.add(kind=reason.value, count=2)
    for kind in (*RouteKind, "of_a_later_version"):
        known.gateway.routes.add(kind=kind, count=7)
    print_status(after, known)
    waits, routes = output(after).splitlines()[-2:]
    assert waits == (
        "requests that wait for a replica: 2 for a place among the sequences that run, 2 for free KV blocks, "
        "2 for prompts that are computed first, 2 behind others"
    )
    assert routes == (
        "requests so far: 7 by one replica alone, 7 with prompt and answer on two, 7 with the help of a mixed one, "
        "7 with the help of the other pool, 7 of_a_later_version"
    )
    _, waits, routes, *_ = status_lines(known)
    assert waits == "event=waiting no_place=2 no_blocks=2 prompts=2 behind=2"
    assert routes == "event=routes alone=7 split=7 spilled=7 pulled=7 of_a_later_version=7"
