"""Ranks say what they are when they join, and are refused where they differ in what they must have in common."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import pytest

from placement.errors import FieldError, HeterodyneError
from tests.support.memberships import READY_S, joined
from workers.replica.agreement import MOST_BYTES, TOPICS, RankFacts, RanksDiffer, check_alike
from workers.replica.membership import Membership
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import Kind
from workers.transport.link import outgoing
from workers.transport.mesh import Channel

FACTS = RankFacts(target="avx2", values={name: f"the {name} of all" for name in TOPICS})


def with_value(facts: RankFacts, **values: str) -> RankFacts:
    return replace(facts, values={**facts.values, **values})


def outcome(future: "Future[tuple[RankFacts, ...]]") -> object:
    return future.exception(READY_S) or future.result(READY_S)


def agreed(members: list[Membership], facts: list[RankFacts]) -> list[object]:
    """What each rank learns of all, or what it raises."""
    with ThreadPoolExecutor(len(members)) as pool:
        futures = [pool.submit(member.agree, own) for member, own in zip(members, facts, strict=True)]
        wait(futures, READY_S)
        return [outcome(future) for future in futures]


def test_ranks_of_different_targets_agree_and_know_each_other() -> None:
    ranks = [FACTS, replace(FACTS, target="generic"), replace(FACTS, target="cuda NVIDIA H200")]
    with joined((2, 1)) as members:
        assert agreed(members, ranks) == [tuple(ranks)] * 3


@pytest.mark.parametrize("name", list(TOPICS))
def test_every_rank_refuses_one_that_differs_and_names_the_topic(name: str) -> None:
    with joined((2,)) as members:
        for error in agreed(members, [FACTS, with_value(FACTS, **{name: "another"})]):
            assert isinstance(error, RanksDiffer) and isinstance(error, FieldError)
            assert error.field == name and error.fix == TOPICS[name].fix
            assert error.problem.startswith("rank 1 has ") and error.problem.endswith(f"rank 0 has the {name} of all")
            assert "another" in error.problem


def test_a_difference_of_version_is_told_before_what_follows_from_it() -> None:
    older = with_value(FACTS, version="0.3.1", code="1a2b", limits="none")
    newer = with_value(FACTS, version="0.4.0", code="3c4d")
    with pytest.raises(RanksDiffer) as caught:
        check_alike([newer, older])
    assert str(caught.value) == (
        "version: rank 1 has version 0.3.1 of heterodyne, rank 0 has 0.4.0. Install the same version on all machines."
    )


def test_all_ranks_that_differ_are_named() -> None:
    small, large = with_value(FACTS, dtype="bfloat16"), with_value(FACTS, dtype="float64")
    with pytest.raises(RanksDiffer) as caught:
        check_alike([FACTS, small, FACTS, large, small])
    assert caught.value.problem == (
        "ranks 1 and 4 have dtype bfloat16, rank 3 has float64, ranks 0 and 2 have the dtype of all"
    )


def test_what_a_rank_does_not_say_is_a_difference() -> None:
    silent = replace(FACTS, values={name: value for name, value in FACTS.values.items() if name != "layout"})
    with pytest.raises(RanksDiffer, match="rank 1 has a layout of the ranks with the digest none"):
        check_alike([FACTS, silent])


def test_facts_survive_the_wire() -> None:
    assert RankFacts.unpack(FACTS.pack()) == FACTS
    assert FACTS.pack().nbytes < MOST_BYTES


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"target": "avx2"}', b'{"target": "a", "values": 3}', b"\xff"])
def test_other_bytes_are_no_facts(data: bytes) -> None:
    with pytest.raises(BadFrame):
        RankFacts.unpack(memoryview(data))


def says_nothing_known(member: Membership) -> None:
    send_raw(member, Kind.FACTS, b"an older version's words")


def begins_with_a_step(member: Membership) -> None:
    send_raw(member, Kind.STEP, b"")


def send_raw(member: Membership, kind: Kind, payload: bytes) -> None:
    (link,) = member._mesh.of(Channel.COMPUTE).values()
    assert outgoing(link, kind, memoryview(payload)).advance()


@pytest.mark.parametrize("speak", [says_nothing_known, begins_with_a_step])
def test_a_rank_of_another_version_that_cannot_be_understood_is_named(speak: Callable[[Membership], None]) -> None:
    with joined((2,)) as members:
        speak(members[1])
        with pytest.raises(RanksDiffer, match="rank 1 says nothing of itself that this version") as caught:
            members[0].agree(FACTS)
        assert caught.value.fix == "Install the same version on all machines."


def test_the_loss_of_a_rank_and_a_stop_end_the_wait() -> None:
    with joined((2,)) as members:
        with pytest.raises(InterruptedError):
            members[0].agree(FACTS, go_on=stop)
        members[1].leave("it has gone home")
        with pytest.raises(HeterodyneError, match="rank 1: it has gone home") as caught:
            members[0].agree(FACTS)
        assert isinstance(caught.value, PeerFailed)


def stop() -> None:
    raise InterruptedError
