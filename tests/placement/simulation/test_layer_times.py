"""The time of a step is the sum of its layers', each from its own measurement."""

import pytest

from placement.serving.step_plan import Chunk
from placement.simulation.layer_times import AllReduces, LayeredSteps, LayerTimes
from placement.simulation.tables import Table


def attention_s(tokens: float, before: float, decodes: float, context: float) -> float:
    return 1e-6 * (1 + tokens + 0.01 * tokens * before + decodes * context)


TIMES = LayerTimes(
    num_layers=4,
    dense=Table([((size,), 1e-3 + 1e-5 * size) for size in (1, 64, 256)]),
    per_sequence=Table([((size,), 1e-4 * size) for size in (1, 64)]),
    attention=Table(
        [
            ((t, b, n, c), attention_s(t, b, n, c))
            for t in (0, 128, 256)
            for b in ((0,) if not t else (0, 256))
            for n in (0, 1, 64)
            for c in ((0,) if not n else (1, 1024))
            if t or n
        ]
    ),
)
STEPS = LayeredSteps(TIMES, step_s=0.5)


def decode(context: int) -> Chunk:
    return Chunk(sequence_id=0, start=context - 1, num_tokens=1, samples=True, is_decode=True)


def prefill(start: int, count: int, *, samples: bool = False) -> Chunk:
    return Chunk(sequence_id=0, start=start, num_tokens=count, samples=samples)


def test_decodes_attend_over_their_mean_context() -> None:
    time = STEPS.step_time([decode(100), decode(300)])
    assert time.is_measured
    assert time.seconds == pytest.approx(0.5 + 1e-3 + 2e-5 + 2e-4 + 4 * attention_s(0, 0, 2, 200))


def test_a_chunk_that_does_not_end_a_prompt_samples_nothing() -> None:
    assert STEPS.step_time([prefill(256, 128)]).seconds == pytest.approx(
        0.5 + 1e-3 + 128e-5 + 4 * attention_s(128, 256, 0, 0)
    )


def test_several_prompts_share_the_call_that_attends() -> None:
    both = STEPS.step_time([prefill(0, 128), prefill(0, 128)]).seconds
    assert both == pytest.approx(0.5 + 1e-3 + 256e-5 + 4 * (2 * attention_s(128, 0, 0, 0) - attention_s(0, 0, 1, 1)))


@pytest.mark.parametrize("chunks", [[prefill(0, 512)], [decode(5000)], [decode(10)] * 65])
def test_what_was_not_measured_is_told(chunks: list[Chunk]) -> None:
    assert not STEPS.step_time(chunks).is_measured


@pytest.mark.parametrize(
    ("num_ranks", "num_tokens", "step_s"),
    [(1, 1000, 0.0), (2, 1000, 10 * 2.0), (4, 1000, 10 * 6 * (1.0 + 0.25)), (4, 10, 10 * (1.0 + 0.03))],
)
def test_sums_go_by_the_faster_way(num_ranks: int, num_tokens: int, step_s: float) -> None:
    if num_ranks == 4 and num_tokens == 1000:
        step_s = 10 * min(1.0 + 3.0, 6 * 1.25)
    sums = AllReduces(num_ranks=num_ranks, per_step=10, bytes_per_token=2, latency_s=1.0, bytes_per_s=2000.0)
    assert sums.step_s(num_tokens) == pytest.approx(step_s)
