"""The cases of the engine benchmark and the figures that come of them."""

import pytest

from tests.benchmarks.engine.engine_cases import (
    BEFORE,
    LINEARS,
    OURS,
    Case,
    Sample,
    best_peer,
    cases,
    headline_metrics,
    ratio,
)

CHOSEN = cases(context=128, steps=32)


def at(*rates: float) -> list[Sample]:
    """Measurements at these tokens per second."""
    return [Sample(seconds=10.0, tokens=int(10 * rate)) for rate in rates]


def test_cases_are_those_that_the_project_is_judged_by() -> None:
    assert [case.name for case in CHOSEN] == [
        "prefill_128x1",
        "prefill_128x16",
        "prefill_2048x1",
        "decode_b1",
        "decode_b8",
        "decode_b16",
        "decode_b64",
    ]


def test_decodes_lie_around_the_context_asked_for() -> None:
    decode = CHOSEN[-1]
    assert decode.num_tokens + decode.num_steps / 2 == 128
    assert Case(phase="decode", num_tokens=112, num_sequences=64, num_steps=32) == decode


def test_ratio_is_over_the_peer_that_is_fastest_by_its_median_repeat_by_repeat() -> None:
    samples = {
        (OURS, "decode_b1"): at(20, 22, 30),
        ("transformers", "decode_b1"): at(100, 5, 5),
        ("vllm", "decode_b1"): at(10, 10, 12),
    }
    found = ratio(samples, "decode_b1")
    assert best_peer(samples, "decode_b1") == "vllm"
    assert found is not None
    assert (found.value, found.samples, found.spread) == (2.2, 3, (2.0, 2.5))


def test_there_is_no_ratio_without_a_peer_and_none_without_us() -> None:
    assert ratio({(OURS, "decode_b1"): at(20)}, "decode_b1") is None
    assert ratio({("vllm", "decode_b1"): at(20)}, "decode_b1") is None
    assert ratio({(OURS, "decode_b1"): at(20), (LINEARS, "decode_b1"): at(30)}, "decode_b1") is None


def test_prefill_ratio_is_the_geometric_mean_over_the_shapes() -> None:
    samples = {
        (OURS, "prefill_128x1"): at(200),
        ("vllm", "prefill_128x1"): at(100),
        (OURS, "prefill_128x16"): at(400),
        ("vllm", "prefill_128x16"): at(50),
        (OURS, "decode_b1"): at(30),
        ("llamacpp", "decode_b1"): at(20),
    }
    found = headline_metrics(samples, CHOSEN)
    assert found["prefill_ratio"].value == pytest.approx(4.0)
    assert found["decode_ratio_b1"].value == 1.5
    assert found["ratio_prefill_128x16"].value == 8.0


def test_share_of_the_roofline_is_our_rate_over_that_of_the_linear_layers_alone() -> None:
    samples = {(OURS, "decode_b8"): at(80, 90), (LINEARS, "decode_b8"): at(100, 100)}
    assert headline_metrics(samples, CHOSEN)["roofline_share_b8"].value == 85.0


def test_ratio_to_another_checkout_is_repeat_by_repeat() -> None:
    samples = {(OURS, "decode_b8"): at(80, 90, 99), (BEFORE, "decode_b8"): at(100, 90, 90)}
    metric = headline_metrics(samples, CHOSEN)["before_ratio_decode_b8"]
    assert (metric.value, metric.spread) == (1.0, (0.8, 1.1))
