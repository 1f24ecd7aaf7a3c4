import math
from typing import Any

import pytest

from placement.errors import InvalidModel
from placement.model.hf import read_model_spec, saved_dtype
from placement.model.specs import DType, ModelSpec, RopeSpec

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "num_hidden_layers": 7,
    "hidden_size": 120,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "intermediate_size": 96,
    "vocab_size": 509,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name != key}


def test_a_full_config_is_read() -> None:
    assert read_model_spec(CONFIG) == ModelSpec(
        architecture="llama",
        num_layers=7,
        hidden_size=120,
        num_heads=15,
        num_kv_heads=5,
        head_dim=8,
        ffn_size=96,
        vocab_size=509,
        max_context_tokens=2048,
        rms_norm_eps=1e-5,
        rope=RopeSpec(theta=10_000.0),
        tied_embeddings=False,
        eos_token_ids=(2,),
    )


def test_given_head_dim_need_not_divide_the_hidden_size() -> None:
    assert read_model_spec(CONFIG | {"head_dim": 64, "hidden_size": 100}).head_dim == 64


@pytest.mark.parametrize("given", [without("num_key_value_heads"), CONFIG | {"num_key_value_heads": None}])
def test_absent_kv_heads_mean_one_for_each_query_head(given: dict[str, Any]) -> None:
    assert read_model_spec(given).num_kv_heads == 15


def test_flags_are_read() -> None:
    model = read_model_spec(CONFIG | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True})
    assert (model.tied_embeddings, model.qkv_bias, model.output_bias, model.mlp_bias) == (True, True, True, True)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_read_from_either_key(key: str) -> None:
    assert saved_dtype(CONFIG | {key: "bfloat16"}) is DType.BFLOAT16
    assert saved_dtype(CONFIG) is DType.FLOAT32


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (2,)),
        ({}, (2,)),
        ({"eos_token_id": None}, (2,)),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 3, 7]}, (7, 3)),
    ],
)
def test_generation_config_wins_for_eos(generation: dict[str, Any] | None, expected: tuple[int, ...]) -> None:
    assert read_model_spec(CONFIG, generation).eos_token_ids == expected


def test_a_model_without_eos_has_none() -> None:
    assert read_model_spec(without("eos_token_id")).eos_token_ids == ()


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
)
@pytest.mark.parametrize("value", [None, 0, -1, "8", True, [8], 2**62, math.nan, math.inf, 0.5 + 2**40])
def test_impossible_sizes_are_refused(key: str, value: object) -> None:
    with pytest.raises(InvalidModel) as caught:
        read_model_spec(CONFIG | {key: value})
    assert caught.value.field == f"config.json: {key}"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "mixtral"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"num_key_value_heads": 30}, "num_key_value_heads"),
        ({"hidden_size": 121}, "hidden_size"),
        ({"hidden_size": 105}, "head_dim"),
        ({"head_dim": 7}, "head_dim"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"eos_token_id": 509}, "eos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        read_model_spec(CONFIG | changes)
    assert caught.value.field == f"config.json: {field}"
    assert caught.value.fix


def test_a_bad_eos_names_the_file_it_stands_in() -> None:
    with pytest.raises(InvalidModel) as caught:
        read_model_spec(CONFIG, {"eos_token_id": -1})
    assert caught.value.field == "generation_config.json: eos_token_id"


@pytest.mark.parametrize("given", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": ["float32"]}])
def test_a_saved_dtype_that_is_not_served_is_refused_with_the_way_out(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidModel, match=r"Set model\.dtype to bfloat16 or float32") as caught:
        saved_dtype(CONFIG | given)
    (key,) = given
    assert caught.value.field == f"config.json: {key}"
    assert read_model_spec(CONFIG | given) == read_model_spec(CONFIG), "a deployment that names a type is served"
