import math
from typing import Any

import pytest

from placement.errors import InvalidModel
from placement.model.hf import read_model_spec
from placement.model.specs import RopeSpec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 509,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SPEC = RopeSpec(
    theta=5e5,
    kind="llama3",
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_tokens=8192,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def rope_of(changes: dict[str, Any]) -> RopeSpec:
    model = read_model_spec(CONFIG | changes)
    assert model.local_rope is None
    return model.rope


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, RopeSpec(theta=1e4)),
        ({"rope_theta": 5e5}, RopeSpec(theta=5e5)),
        ({"rope_theta": 500000, "rope_scaling": None}, RopeSpec(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, RopeSpec(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, LLAMA3_SPEC),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, LLAMA3_SPEC),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeSpec(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 9.0}, "rope_theta": 5e5, "rope_scaling": LLAMA3}, LLAMA3_SPEC),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec(kind="linear", factor=2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, RopeSpec(kind="linear", factor=2.0)),
    ],
)
def test_rope_is_read_in_old_and_new_layout(rope: dict[str, Any], expected: RopeSpec) -> None:
    assert rope_of(rope) == expected


@pytest.mark.parametrize("layout", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"attention_factor": 0.1 * math.log(4.0) + 1.0}),
        ({"factor": 1.0}, {"factor": 1.0, "attention_factor": 1.0}),
        ({"factor": None}, {"factor": 2.0, "attention_factor": 0.1 * math.log(2.0) + 1.0}),
        ({"attention_factor": 0.5, "mscale": 3.0, "mscale_all_dim": 1.0}, {"attention_factor": 0.5}),
        (
            {"mscale": 0.7, "mscale_all_dim": 2.0},
            {"attention_factor": (0.07 * math.log(4.0) + 1.0) / (0.2 * math.log(4.0) + 1.0)},
        ),
        ({"mscale": 0.7}, {"attention_factor": 0.1 * math.log(4.0) + 1.0}),
        (
            {"beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.0},
            {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.0},
        ),
    ],
)
def test_yarn_is_read(layout: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    rope = rope_of({layout: YARN | changes})
    wanted = {"factor": 4.0, "original_max_tokens": 1024} | expected
    assert rope == RopeSpec(kind="yarn", **{**wanted, "attention_factor": rope.attention_factor})
    assert rope.attention_factor == pytest.approx(wanted["attention_factor"])


def test_the_original_context_is_the_models_own_where_it_is_not_said() -> None:
    assert rope_of({"rope_scaling": {"type": "yarn", "factor": 4.0}}).original_max_tokens == 2048
    assert rope_of({"rope_scaling": YARN, "original_max_position_embeddings": 512}).original_max_tokens == 512


@pytest.mark.parametrize(
    ("rope", "max_context_tokens"),
    [
        ({}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 2048),
        ({"rope_scaling": LLAMA3}, 2048),
        ({"rope_scaling": YARN}, 4096),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 8192),
        ({"rope_scaling": YARN | {"factor": 1.5}}, 2048),
    ],
)
def test_yarn_lengthens_the_context_that_its_file_gives(rope: dict[str, Any], max_context_tokens: int) -> None:
    assert read_model_spec(CONFIG | rope).max_context_tokens == max_context_tokens


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "rope_scaling.factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "rope_scaling.low_freq_factor"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 0}},
            "rope_scaling.original_max_position_embeddings",
        ),
        ({"rope_scaling": YARN | {"factor": 0}}, "rope_scaling.factor"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling.truncate"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "rope_scaling.attention_factor"),
        ({"rope_scaling": YARN | {"mscale": "a", "mscale_all_dim": 1.0}}, "rope_scaling.mscale"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": True}, "original_max_position_embeddings"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        read_model_spec(CONFIG | changes)
    assert caught.value.field == f"config.json: {field}"
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su"])
def test_a_rope_that_varies_with_the_length_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(InvalidModel, match="change with the length of the sequence"):
        read_model_spec(CONFIG | {"rope_scaling": {"type": kind, "factor": 4.0}})
