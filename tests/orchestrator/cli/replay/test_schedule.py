"""The schedule of a replay, and the prompts that are drawn for it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.replay.prompts import Prompts, make_request
from orchestrator.cli.replay.schedule import Part, PlannedRequest, clipped, make_schedule
from orchestrator.cli.replay.trace import BLOCK_TOKENS, TraceRequest, read_trace

TRACES = Path(__file__).resolve().parents[4] / "deploy" / "traces"
LARGE = 2**20


def recorded(
    at_s: float, prompt_tokens: int, answer_tokens: int = 4, blocks: tuple[int, ...] | None = None
) -> TraceRequest:
    return TraceRequest(at_s=at_s, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens, blocks=blocks)


def test_a_rate_divides_times_and_a_scale_multiplies_lengths() -> None:
    trace = [recorded(0.0, 10, 4), recorded(3.0, 1, 0)]
    schedule = make_schedule(trace, rate=2.0, scale=0.5, max_context_tokens=LARGE)
    assert schedule.requests == (
        PlannedRequest(index=0, due_s=0.0, prompt_tokens=5, answer_tokens=2),
        PlannedRequest(index=1, due_s=1.5, prompt_tokens=1, answer_tokens=1),
    )
    assert (schedule.num_clipped, schedule.shared_tokens) == (0, 0)


def test_only_the_first_seconds_of_the_trace_and_the_first_requests_of_those_are_sent() -> None:
    trace = [recorded(float(second), 1) for second in range(10)]

    def times(duration_s: float | None = None, limit: int | None = None) -> list[float]:
        schedule = make_schedule(trace, rate=2.0, max_context_tokens=LARGE, duration_s=duration_s, limit=limit)
        return [request.due_s for request in schedule.requests]

    assert times(duration_s=3.0) == [0.0, 0.5, 1.0]
    assert times(duration_s=3.0, limit=2) == [0.0, 0.5]
    assert len(times()) == 10


def test_what_is_longer_than_the_context_is_clipped_in_proportion_and_counted() -> None:
    schedule = make_schedule([recorded(0.0, 300, 100), recorded(0.0, 75, 25)], max_context_tokens=100)
    assert [(r.prompt_tokens, r.answer_tokens) for r in schedule.requests] == [(75, 25), (75, 25)]
    assert schedule.num_clipped == 1


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(2, 10**5))
def test_clipped_lengths_fit_and_are_never_0(prompt_tokens: int, answer_tokens: int, context: int) -> None:
    prompt, answer = clipped(prompt_tokens, answer_tokens, context)
    assert prompt >= 1 and answer >= 1
    assert prompt + answer == min(context, prompt_tokens + answer_tokens)


@given(st.integers(1, 5 * BLOCK_TOKENS), st.floats(1e-4, 3.0), st.integers(2, 4000))
def test_parts_make_up_the_prompt_whatever_the_scale(prompt_tokens: int, scale: float, context: int) -> None:
    blocks = tuple(range(-(-prompt_tokens // BLOCK_TOKENS)))
    (request,) = make_schedule(
        [recorded(0.0, prompt_tokens, 1, blocks)], scale=scale, max_context_tokens=context
    ).requests
    assert request.parts is not None
    assert sum(part.num_tokens for part in request.parts) == request.prompt_tokens
    assert len(Prompts(seed=0, vocab_size=9).token_ids(request)) == request.prompt_tokens


def test_blocks_that_an_earlier_prompt_begins_with_are_shared() -> None:
    trace = [
        recorded(0.0, 1024, blocks=(1, 2)),
        recorded(1.0, 1024, blocks=(1, 3)),
        recorded(2.0, 1100, blocks=(1, 3, 4)),
        recorded(3.0, 512, blocks=(3,)),  # not at the beginning of any
    ]
    schedule = make_schedule(trace, scale=0.5, max_context_tokens=LARGE)
    assert schedule.shared_tokens == 256 + 512
    assert schedule.requests[2].parts == (
        Part(block=1, num_tokens=256), Part(block=3, num_tokens=256), Part(block=4, num_tokens=38),
    )  # fmt: skip


def test_equal_blocks_are_equal_tokens_and_others_are_not() -> None:
    trace = [
        recorded(0.0, 1024, blocks=(1, 2)),
        recorded(0.0, 1024, blocks=(1, 3)),
        recorded(0.0, 1024),
        recorded(0.0, 1024),
    ]
    requests = make_schedule(trace, scale=0.25, max_context_tokens=LARGE).requests
    prompts = Prompts(seed=5, vocab_size=1000)
    one, other, alone, also_alone = map(prompts.token_ids, requests)
    assert one[:128] == other[:128]
    assert one[128:] != other[128:] and alone[:128] != also_alone[:128]
    assert [len(ids) for ids in (one, other, alone)] == [256, 256, 256]
    assert all(0 <= token_id < 1000 for ids in (one, other, alone) for token_id in ids)
    assert [Prompts(seed=5, vocab_size=1000).token_ids(r) for r in requests] == [one, other, alone, also_alone]
    assert Prompts(seed=6, vocab_size=1000).token_ids(requests[0]) != one


def test_a_part_of_a_block_begins_as_the_block_does() -> None:
    prompts = Prompts(seed=5, vocab_size=1000)

    def drawn(num_tokens: int) -> list[int]:
        part = Part(block=3, num_tokens=num_tokens)
        request = PlannedRequest(index=0, due_s=0.0, prompt_tokens=num_tokens, answer_tokens=1, parts=(part,))
        return prompts.token_ids(request)

    whole = drawn(BLOCK_TOKENS)
    assert all(drawn(num_tokens) == whole[:num_tokens] for num_tokens in (1, 2, 3, 64, 65, 511))


def test_a_request_is_greedy_and_as_long_as_planned() -> None:
    planned = PlannedRequest(index=0, due_s=0.0, prompt_tokens=3, answer_tokens=7)
    request = make_request(planned, Prompts(seed=0, vocab_size=9), cache_salt="x")
    assert len(request.prompt_ids.ids) == 3 and request.max_tokens == 7
    assert request.ignore_eos and request.sampling.temperature == 0.0 and request.sampling.HasField("temperature")
    assert request.cache_salt == "x"


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_the_sample_of_mooncake_has_prompts_that_begin_alike(scale: float) -> None:
    schedule = make_schedule(read_trace(TRACES / "mooncake-synthetic.jsonl"), scale=scale, max_context_tokens=LARGE)
    assert schedule.shared_tokens > 0
