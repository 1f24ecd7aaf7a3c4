"""Checks how long ranks wait for each other: as the leader says with each step, by what its steps took."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from placement.measured.patience import Patience
from tests.support.ranks import Ranks, ranks
from tests.support.steps import greedy_sampler, run
from workers.replica.patience import PatientRunner
from workers.step.types import Batch, SequenceInput, StepResult
from workers.transport.errors import PeerFailed

SLOW_S = 0.5


@pytest.fixture(params=[[(1, 1)], [(1,), (1,)]], ids=["tensor-parallel", "pipeline"])
def cut(request: pytest.FixtureRequest, llama_checkpoint: Callable[..., Path]) -> Iterator[Ranks]:
    with ranks(llama_checkpoint(), *request.param, checks=False) as made:
        yield made


def _decode() -> SequenceInput:
    return SequenceInput(token_ids=[1], start=0, runs=((0, 1),), sampler=greedy_sampler(), samples=True)


def _patient(cut: Ranks) -> PatientRunner:
    assert isinstance(cut.leader, PatientRunner)
    return cut.leader


class Timed:
    """Runs steps that take as long as it is told."""

    duration_s = 0.0

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        return lambda: StepResult(tokens=(), duration_s=self.duration_s)


def test_ranks_may_wait_as_long_as_the_steps_so_far_suggest() -> None:
    limits: list[float] = []
    timed = Timed()
    runner = PatientRunner(timed, limits.append)
    runner.prepare(Batch(sequences=()))()
    runner.patience = Patience(floor_s=30.0)
    for timed.duration_s in (0.1, 8.0, 0.1):
        runner.prepare(Batch(sequences=()))()
    runner.prepare(Batch(sequences=()))
    assert limits[0] > 60.0, "the first steps of all compile code"
    assert limits[1:] == pytest.approx([27.0, 27.0, 72.0, 72.0])


def test_a_leader_tells_the_others_with_each_step_how_long_they_may_wait(cut: Ranks) -> None:
    _patient(cut).patience = Patience(floor_s=30.0, expected_s=70.0)
    run(cut, [_decode()])
    run(cut, [_decode()])
    assert [cut.membership(rank).group.limit_s for rank in range(2)] == pytest.approx([630.0, 630.0])


def test_a_rank_that_is_slow_is_waited_for(cut: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes longer than the floor allows, and shorter than a step is expected to take."""
    expected = run(cut, [_decode()])
    hold_up(cut, monkeypatch, lambda: threading.Event().wait(SLOW_S))
    _patient(cut).patience = Patience(floor_s=SLOW_S / 10, expected_s=60.0)
    assert [token and token.token_id for token in run(cut, [_decode()])] == [
        token and token.token_id for token in expected
    ]


def test_a_rank_that_hangs_is_named_once_a_step_has_taken_too_long(
    llama_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ranks(llama_checkpoint(), (1, 1), checks=False) as cut:
        run(cut, [_decode()])
        held = threading.Event()
        hold_up(cut, monkeypatch, held.wait)
        _patient(cut).patience = Patience(floor_s=SLOW_S)
        with pytest.raises(PeerFailed) as caught:
            run(cut, [_decode()])
        held.set()
        assert caught.value.rank == 1


def hold_up(cut: Ranks, monkeypatch: pytest.MonkeyPatch, wait: Callable[[], object]) -> None:
    """The second rank waits before it computes anything."""
    runner = cut.runner(1)
    for name in ("compute", "forward"):
        compute = getattr(runner, name)

        def held_up(*arguments: Any, compute: Callable[..., Any] = compute) -> Any:
            wait()
            return compute(*arguments)

        monkeypatch.setattr(runner, name, held_up)
