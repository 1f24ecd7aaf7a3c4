"""Requests come at their times, at random, or when clients have their answers."""

import pytest

from placement.simulation.load import ClosedLoop, OpenLoop, Request, at_random, at_rate

SIZES = [(10, 5), (20, 6), (30, 7), (40, 8)]
REQUESTS = [Request(number=i, prompt_tokens=p, answer_tokens=a, at_s=2.0 * i) for i, (p, a) in enumerate(SIZES)]


def test_no_two_prompts_begin_alike_unless_their_tokens_are_given() -> None:
    prompts = [request.tokens() for request in REQUESTS]
    assert [len(tokens) for tokens in prompts] == [10, 20, 30, 40]
    assert len({tokens[0] for tokens in prompts}) == 4
    assert Request(number=9, prompt_tokens=2, answer_tokens=1, prompt_ids=(7, 8)).tokens() == (7, 8)


def test_a_very_long_prompt_has_all_its_tokens() -> None:
    assert len(Request(number=0, prompt_tokens=100_000, answer_tokens=1).tokens()) == 100_000


def test_an_open_loop_waits_for_nobody() -> None:
    load = OpenLoop(reversed(REQUESTS))
    assert [request.number for request in load.start()] == [0, 1, 2, 3]
    assert load.ended(0, 1.0) is None


def test_a_closed_loop_sends_the_next_after_a_pause() -> None:
    load = ClosedLoop(REQUESTS, num_clients=2, pause_s=0.5)
    assert [(it.number, it.at_s) for it in load.start()] == [(0, 0.0), (1, 0.0)]
    following = [load.ended(1, 3.0), load.ended(0, 4.0), load.ended(2, 5.0)]
    assert [it and (it.number, it.at_s) for it in following] == [(2, 3.5), (3, 4.5), None]


def test_random_arrivals_follow_from_the_seed_and_have_the_rate() -> None:
    sizes = [(1, 1)] * 4000
    one, same, other = (at_random(sizes, rate=5.0, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert one[-1].at_s == pytest.approx(800.0, rel=0.1)


def test_a_trace_is_played_faster_in_the_same_rhythm() -> None:
    assert [request.at_s for request in at_rate(REQUESTS, 3.0)] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    assert at_rate([], 3.0) == []
