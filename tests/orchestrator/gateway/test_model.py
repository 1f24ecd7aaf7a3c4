"""What a model's own files say of sampling."""

import math

import pytest

from orchestrator.model_dir.default_sampling import DefaultSampling, default_sampling
from placement.errors import InvalidModel

GREEDY = DefaultSampling()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, GREEDY),
        ({"do_sample": False, "temperature": 0.7}, GREEDY),
        ({"do_sample": None}, GREEDY),
        ({"do_sample": True}, DefaultSampling(temperature=1.0, top_k=50, top_p=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
            DefaultSampling(temperature=0.6, top_k=20, top_p=0.9),
        ),
        ({"do_sample": True, "top_k": -1}, DefaultSampling(temperature=1.0)),
        ({"do_sample": True, "top_k": None, "top_p": None}, DefaultSampling(temperature=1.0)),
        ({"do_sample": True, "temperature": 0, "top_k": 7}, GREEDY),
        ({"repetition_penalty": 1.1, "min_p": 0.1}, DefaultSampling(repetition_penalty=1.1)),
        ({"do_sample": True, "temperature": 0, "repetition_penalty": 1.1}, DefaultSampling(repetition_penalty=1.1)),
        (
            {"do_sample": True, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.2},
            DefaultSampling(temperature=1.0, min_p=0.05, repetition_penalty=1.2),
        ),
        ({"do_sample": True, "top_k": 0, "min_p": None, "repetition_penalty": None}, DefaultSampling(temperature=1.0)),
    ],
)
def test_generation_config_is_read(given: dict[str, object], expected: DefaultSampling) -> None:
    assert default_sampling(given) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", "yes"),
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", math.inf),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", 0.0099),
        ("repetition_penalty", 101),
        ("repetition_penalty", math.nan),
    ],
)
def test_values_that_no_sampler_could_use_are_refused(key: str, value: object) -> None:
    with pytest.raises(InvalidModel) as caught:
        default_sampling({"do_sample": True, key: value})
    assert caught.value.field == f"generation_config.json: {key}"
    assert caught.value.fix


def test_clients_see_every_default() -> None:
    message = default_sampling({"do_sample": True, "min_p": 0.25, "repetition_penalty": 1.5}).message()
    assert (message.temperature, message.top_k, message.top_p) == (1.0, 50, 1.0)
    assert (message.min_p, message.repetition_penalty) == (0.25, 1.5)
    assert default_sampling({}).message().repetition_penalty == 1.0
