"""Checks how a warm-up measures steps, and that a leader serves with the token budget that follows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels.attention import Run
from placement.model.part import Span
from placement.model.specs import ModelSpec
from placement.serving.token_budget import budget_of
from protos.codec.limits import read_limits
from protos.codec.log_record import record_of
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.worker import load_request
from workers.host.device import open_device
from workers.startup.checks import read_model
from workers.startup.loading import Loaded, LoadJob
from workers.startup.warm_up import warm_up
from workers.step.types import Batch, StepResult


class Timed:
    """Runs nothing, and says that it took ``token_s`` a token, and ``first_s`` more for the first step of each size.

    Attributes:
        sizes: the start and the tokens of each step that was run.
        forgotten: the blocks whose names each step had attention workers forget, and the slots it wrote to.
    """

    def __init__(self, token_s: float, *, first_s: float = 0.0) -> None:
        self._token_s = token_s
        self._first_s = first_s
        self.sizes: list[tuple[int, int]] = []
        self.forgotten: list[tuple[tuple[int, ...], Run]] = []

    def prepare(self, batch: Batch) -> Callable[[], StepResult]:
        (sequence,) = batch.sequences
        size = (sequence.start, sequence.num_tokens)
        is_first = size not in self.sizes
        self.sizes.append(size)
        self.forgotten.append((batch.forgotten, *sequence.runs))
        duration_s = self._token_s * sequence.num_tokens + (self._first_s if is_first else 0.0)
        return lambda: StepResult(tokens=(None,), duration_s=duration_s)


@pytest.fixture
def model(llama_checkpoint: Callable[..., Path]) -> ModelSpec:
    return read_model(llama_checkpoint())


def request(*, token_budget: int, **fields: Any) -> pb.LoadRequest:
    return pb.LoadRequest(block_size=8, num_blocks=64, token_budget=token_budget, max_num_seqs=4, **fields)


def test_a_warm_up_runs_the_first_step_twice_and_ends_with_a_decode_behind_the_largest_chunk(model: ModelSpec) -> None:
    runner = Timed(0.001)
    times = warm_up(runner, model=model, request=request(token_budget=24))
    assert runner.sizes == [(0, 1), (0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (0, 24), (24, 1)]
    assert [(step.num_tokens, pytest.approx(step.duration_s)) for step in times.steps] == [
        (size, 0.001 * size) for size in (1, 2, 4, 8, 16, 24)
    ]


def test_what_the_first_step_of_a_size_takes_to_compile_does_not_count(model: ModelSpec) -> None:
    runner = Timed(0.001, first_s=20.0)
    times = warm_up(runner, model=model, request=request(token_budget=32, step_time_s=0.5))
    assert [step.num_tokens for step in times.steps] == [1, 2, 4, 8, 16, 32]
    assert times.steps[-1].duration_s == pytest.approx(0.032)


@pytest.mark.parametrize("fields", [{}, {"step_time_s": 0.5}], ids=["set", "auto"])
def test_the_slowest_machine_is_not_asked_for_a_step_of_the_whole_budget(
    model: ModelSpec, fields: dict[str, float]
) -> None:
    """A token takes 2 s, and so 256 of them eight minutes."""
    runner = Timed(2.0)
    times = warm_up(runner, model=model, request=request(token_budget=256, **fields))
    assert [step.num_tokens for step in times.steps] == [1, 2]
    assert sum(2.0 * count for _, count in runner.sizes) <= 12.0
    assert times.expected_s(256) == 512.0, "so the gateway waits long enough for such a step"


def test_names_of_the_blocks_that_it_writes_to_are_forgotten_first(model: ModelSpec) -> None:
    runner = Timed(0.001)
    warm_up(runner, model=model, request=request(token_budget=24), given_up=Span(3, 7))
    assert max(run for _, run in runner.forgotten) == (24, 49)
    assert {blocks for blocks, _ in runner.forgotten} == {(3, 4, 5, 6)}


def test_no_step_has_more_tokens_than_the_cache_has_slots_or_the_model_positions(model: ModelSpec) -> None:
    runner = Timed(1e-6)
    small = pb.LoadRequest(block_size=1, num_blocks=6, token_budget=512)
    assert [step.num_tokens for step in warm_up(runner, model=model, request=small).steps] == [1, 2, 4, 5]
    longest = max(size for _, size in runner.sizes)
    large = pb.LoadRequest(block_size=1, num_blocks=10**6, token_budget=10**6)
    times = warm_up(runner, model=model, request=large)
    assert longest < times.steps[-1].num_tokens == model.max_context_tokens - 1


def loaded(path: Path, **fields: Any) -> Loaded:
    return LoadJob(request=load_request(path, **fields), device=open_device("cpu", 1)).run()


@pytest.mark.parametrize(
    ("fields", "budget"),
    [({"step_time_s": 60.0}, 32), ({"step_time_s": 1e-9}, 24), ({}, 32)],
    ids=["all within the time", "none within the time", "set"],
)
def test_a_leader_serves_with_the_budget_that_its_measured_steps_suggest(
    llama_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture, fields: dict[str, float], budget: int
) -> None:
    caplog.set_level("INFO")
    rank = loaded(llama_checkpoint(), **fields)
    engine, chosen = rank.engine, rank.budget
    assert engine is not None and chosen is not None
    try:
        assert engine._core.settings.steps.token_budget == chosen.token_budget == budget
        assert chosen == budget_of(read_limits(load_request(Path(), **fields)), chosen.times)
        sizes = [step.num_tokens for step in chosen.times.steps]
        assert sizes == ([1, 2] if budget == 24 else [1, 2, 4, 8, 16, 32])
        assert min(step.duration_s for step in chosen.times.steps) > 0
    finally:
        engine.thread.start()
        engine.stop()
        engine.ended.result(10.0)
    (said,) = [record for each in caplog.records if (record := record_of(each, "worker")).event == "step_budget"]
    assert (said.fields["token_budget"], said.fields["auto"]) == (budget, bool(fields))
