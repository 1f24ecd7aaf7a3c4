import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.serving.routing.speed import LineFit, ReplicaSpeed
from placement.serving.step_plan import StepLoad


def prefill(tokens: int, decodes: int = 0) -> StepLoad:
    return StepLoad(num_prefill_tokens=tokens, num_decodes=decodes)


def test_fixed_time_and_time_of_a_token_are_told_apart() -> None:
    fit = LineFit()
    for tokens in (10, 200, 30, 150):
        fit = fit.after(tokens, 0.02 + 0.001 * tokens)
    assert fit.token_s == pytest.approx(0.001) and fit.fixed_s == pytest.approx(0.02)
    assert fit.at(1000) == pytest.approx(1.02)


def test_steps_of_one_size_count_as_time_of_their_tokens() -> None:
    fit = LineFit()
    for _ in range(5):
        fit = fit.after(100, 0.5)
    assert fit.token_s == pytest.approx(0.005) and fit.fixed_s == pytest.approx(0.0)


@given(st.lists(st.tuples(st.integers(0, 10**5), st.floats(1e-6, 1e3)), max_size=30))
def test_no_time_is_negative_and_a_usual_step_takes_the_usual_time(steps: list[tuple[int, float]]) -> None:
    fit = LineFit()
    for tokens, seconds in steps:
        fit = fit.after(tokens, seconds)
    assert fit.token_s >= 0.0 <= fit.fixed_s
    if fit.tokens:
        mean = fit.tokens / fit.weight
        assert fit.fixed_s + fit.token_s * mean == pytest.approx(fit.seconds / fit.weight, rel=1e-6)


def test_new_measurements_displace_old_ones() -> None:
    speed = ReplicaSpeed.expected(prefill_tokens_per_s=100.0)
    assert speed.is_known and speed.prefill_s(50, num_decodes=0, token_budget=256) == pytest.approx(0.5)
    for tokens in (100, 200, 50) * 30:
        speed = speed.after_step(prefill(tokens), tokens / 1000)
    assert speed.prefill_s(1000, num_decodes=0, token_budget=2000) == pytest.approx(1.0, rel=0.02)


def test_many_decodes_do_not_displace_what_is_known_of_prompts() -> None:
    speed = ReplicaSpeed().after_step(prefill(100), 0.1)
    for _ in range(1000):
        speed = speed.after_step(StepLoad(num_decodes=3), 0.03)
    assert speed.prefill_s(100, num_decodes=0, token_budget=256) == pytest.approx(0.1)


def test_time_of_decodes_is_not_counted_as_time_of_the_prompt_beside_them() -> None:
    speed = ReplicaSpeed()
    for decodes in (1, 4, 8):
        speed = speed.after_step(StepLoad(num_decodes=decodes), 0.05 + 0.01 * decodes)
    speed = speed.after_step(prefill(100, decodes=10), 0.3)
    assert speed.prefill_s(100, num_decodes=0, token_budget=256) == pytest.approx(0.2)
    assert speed.prefill_s(100, num_decodes=10, token_budget=256) == pytest.approx(0.3)


def test_prompts_longer_than_the_budget_take_several_steps() -> None:
    speed = ReplicaSpeed()
    for tokens in (10, 100):
        speed = speed.after_step(prefill(tokens), 0.1 + 0.001 * tokens)
    assert speed.prefill_s(300, num_decodes=0, token_budget=100) == pytest.approx(3 * 0.1 + 0.3)
    assert speed.prefill_s(300, num_decodes=50, token_budget=100) == pytest.approx(6 * 0.1 + 0.3)
    assert speed.prefill_s(0, num_decodes=0, token_budget=100) == 0.0


def test_steps_that_tell_nothing_change_nothing() -> None:
    speed = ReplicaSpeed().after_step(prefill(10), 0.1)
    assert speed.after_step(prefill(10), 0.0) == speed, "an old worker does not say how long"
    assert speed.after_step(StepLoad(), 0.1) == speed
    assert not ReplicaSpeed().is_known


def test_place_takes_as_long_as_answers_take_to_end() -> None:
    speed = ReplicaSpeed().after_step(StepLoad(num_decodes=4), 0.1)
    assert speed.place_s(1, num_running=4) == 0.0, "no answer has ended, so their length is not known"
    speed = speed.after_answer(80)
    assert speed.place_s(1, num_running=4) == pytest.approx(80 * 0.1 / 4)
    assert speed.place_s(2, num_running=4) == pytest.approx(80 * 0.1 / 2)
    assert speed.place_s(0, num_running=4) == speed.place_s(1, num_running=0) == 0.0
    assert speed.after_answer(180).answer_tokens == pytest.approx(85)
