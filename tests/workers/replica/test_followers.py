"""A leader and the ranks that follow it: what either does when the other fails."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from placement.serving.events import EndReason
from tests.support.engine import Listener, engines, submission
from tests.support.ranks import Ranks, ranks
from tests.support.steps import greedy_sampler, run
from workers.step.types import SequenceInput


@pytest.fixture
def cut(llama_checkpoint: Callable[..., Path]) -> Iterator[Ranks]:
    with ranks(llama_checkpoint(), (1, 1), checks=False) as made:
        yield made


def _decode() -> SequenceInput:
    return SequenceInput(token_ids=[1], start=0, runs=((0, 1),), sampler=greedy_sampler(), samples=True)


def test_a_follower_that_fails_ends_the_leaders_step_with_its_words(
    cut: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cut, [_decode()])

    def fail(*_: object) -> None:
        raise RuntimeError("lost its disk")

    monkeypatch.setattr(cut.runner(1), "compute", fail)
    with pytest.raises(Exception, match=r"rank 1: RuntimeError: lost its disk"):
        for _ in range(3):
            run(cut, [_decode()])
    assert str(cut.failures[0]) == "lost its disk"


def test_an_engine_whose_follower_fails_ends_every_sequence_with_the_cause(
    cut: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("lost its disk")

    with engines() as make:
        parts = make(cut)
        listener = Listener()
        monkeypatch.setattr(cut.runner(1), "compute", fail)
        parts.engine.submit(listener, 0, submission([1, 2, 3]))
        listener.wait_ends(1)
        assert listener.ends[0].end is EndReason.FAILED
        assert "rank 1" in listener.ends[0].detail


def test_a_leader_that_leaves_is_the_end_of_those_who_follow(cut: Ranks) -> None:
    run(cut, [_decode()])
    cut.membership(0).leave("was told to stop")
    cut.follower(1).ended.result(10.0)
    assert str(cut.failures[0]) == "rank 0: was told to stop"


def test_noise_in_place_of_a_step_ends_the_follower(cut: Ranks) -> None:
    link = cut.membership(0).steps[1]
    link.socket.sendall(os.urandom(100))
    cut.follower(1).ended.result(10.0)
    assert "no frame begins with" in str(cut.failures[0])


def test_a_follower_that_is_told_to_stop_has_not_failed(cut: Ranks) -> None:
    cut.follower(1).stop()
    cut.follower(1).ended.result(10.0)
    assert not cut.failures
