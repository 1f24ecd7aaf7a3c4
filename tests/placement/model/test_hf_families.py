"""Reads configurations of published models, in the layouts they are published in and that of transformers 5."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from placement.errors import InvalidModel
from placement.model.hf import read_model_spec
from placement.model.specs import ModelSpec, RopeSpec

MISTRAL_V1: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA: dict[str, Any] = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
PUBLISHED = (MISTRAL_V1, QWEN2, QWEN3, GEMMA, GEMMA3)


def traits(model: ModelSpec) -> dict[str, Any]:
    """Lists what sets the layers apart from those of Llama: every field that is not at its default."""
    defaults = {field.name: field.default for field in fields(model)} | {"tied_embeddings": False}
    named = {name: getattr(model, name) for name, default in defaults.items() if default is not MISSING}
    return {name: value for name, value in named.items() if value != defaults[name] and name != "eos_token_ids"}


def test_mistral_has_a_window_in_every_layer() -> None:
    model = read_model_spec(MISTRAL_V1)
    assert (model.architecture, model.head_dim, model.rope) == ("mistral", 128, RopeSpec(theta=1e4))
    assert traits(model) == {"windows": (4096,) * 32}
    assert model.distinct_windows == (4096,)


def test_a_newer_mistral_has_none() -> None:
    model = read_model_spec(MISTRAL_V1 | {"sliding_window": None, "head_dim": 160})
    assert traits(model) == {}
    assert (model.head_dim, model.distinct_windows, model.layers[3].attention.window) == (160, (None,), None)


def test_a_mistral_that_leaves_the_window_out_has_that_of_transformers() -> None:
    absent = {key: value for key, value in MISTRAL_V1.items() if key != "sliding_window"}
    assert read_model_spec(absent).windows == (4096,) * 32


def test_a_window_that_no_context_outgrows_is_none() -> None:
    assert read_model_spec(MISTRAL_V1 | {"max_position_embeddings": 4096}).windows == ()
    assert read_model_spec(MISTRAL_V1 | {"max_position_embeddings": 4097}).windows == (4096,) * 32


def test_qwen2_has_biases_on_query_key_and_value() -> None:
    model = read_model_spec(QWEN2)
    assert traits(model) == {"qkv_bias": True}
    assert (model.architecture, model.head_dim, model.rope) == ("qwen2", 128, RopeSpec(theta=1e6))


def test_upper_layers_of_qwen_may_have_windows() -> None:
    on = {"use_sliding_window": True}
    assert read_model_spec(QWEN2 | on).windows == (None,) * 24 + (4096,) * 4
    assert read_model_spec(QWEN2 | on | {"max_window_layers": 28}).windows == ()
    assert read_model_spec(QWEN2 | on | {"sliding_window": None}).windows == ()
    types = ["full_attention", "sliding_attention"] * 14
    assert read_model_spec(QWEN2 | on | {"layer_types": types}).windows == (None, 4096) * 14
    assert read_model_spec(QWEN2 | {"layer_types": ["full_attention"] * 28}).windows == ()


def test_a_stretched_qwen_serves_its_whole_context() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read_model_spec(QWEN2 | {"rope_scaling": yarn}).max_context_tokens == 131072


def test_qwen3_norms_queries_and_keys() -> None:
    model = read_model_spec(QWEN3)
    assert traits(model) == {"qk_norm": True, "tied_embeddings": True}
    assert (model.head_dim, model.num_heads * model.head_dim) == (128, 2048)
    biased = read_model_spec(QWEN3 | {"attention_bias": True})
    assert (biased.qkv_bias, biased.output_bias) == (True, True)


def test_gemma_scales_embeddings_and_offsets_norms() -> None:
    expected = {
        "unit_offset_norms": True,
        "embedding_scale": 2048**0.5,
        "activation": "gelu_tanh",
        "tied_embeddings": True,
    }
    assert traits(read_model_spec(GEMMA)) == expected
    assert traits(read_model_spec(GEMMA | {"hidden_act": "gelu_pytorch_tanh"})) == expected


def test_gemma3_mixes_layers_with_two_ropes() -> None:
    model = read_model_spec(GEMMA3)
    assert traits(model) == {
        "local_rope": RopeSpec(theta=1e4),
        "windows": ((512,) * 5 + (None,)) * 4 + (512,) * 2,
        "attention_scale": 1 / 16,
        "qk_norm": True,
        "post_norms": True,
        "unit_offset_norms": True,
        "embedding_scale": 1152**0.5,
        "activation": "gelu_tanh",
        "tied_embeddings": True,
    }
    assert (model.rope_of(None), model.rope_of(512)) == (RopeSpec(theta=1e6), RopeSpec(theta=1e4))
    assert model.distinct_windows == (512, None)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            }
        },
    ],
)
def test_gemma3_stretches_the_layers_without_a_window_only(rope: dict[str, Any]) -> None:
    model = read_model_spec(GEMMA3 | rope)
    assert model.rope == RopeSpec(theta=1e6, kind="linear", factor=8.0)
    assert model.local_rope == RopeSpec(theta=1e4)


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config["model_type"])
def test_what_transformers_writes_reads_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    given = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    AutoConfig.for_model(config["model_type"], **given).save_pretrained(tmp_path)
    assert read_model_spec(json.loads((tmp_path / "config.json").read_text())) == read_model_spec(config)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"])
def test_defaults_are_those_of_transformers(family: str) -> None:
    """A file that gives only sizes has the meaning that it has for transformers."""
    from transformers import AutoConfig

    sizes = {
        key: QWEN2[key]
        for key in (
            "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "vocab_size", "max_position_embeddings", "rms_norm_eps", "eos_token_id",
        )
    }  # fmt: skip
    whole = AutoConfig.for_model(family, **sizes).to_dict() | {"dtype": None}
    assert read_model_spec(sizes | {"model_type": family}) == read_model_spec(whole)


@pytest.mark.parametrize(
    ("config", "changes", "field"),
    [
        (MISTRAL_V1, {"sliding_window": 0}, "sliding_window"),
        (MISTRAL_V1, {"layer_types": ["full_attention"] * 32}, "layer_types"),
        (MISTRAL_V1, {"architectures": ["LlamaForCausalLM"]}, "architectures"),
        (QWEN2, {"use_sliding_window": 1}, "use_sliding_window"),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers"),
        (QWEN2, {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        (QWEN2, {"use_sliding_window": True, "layer_types": [["full_attention"]] * 28}, "layer_types"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 28}, "layer_types"),
        (QWEN3, {"layer_types": ["chunked_attention"] * 28}, "layer_types"),
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA, {"hidden_act": "relu"}, "hidden_act"),
        (GEMMA3, {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (GEMMA3, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (GEMMA3, {"sliding_window": None}, "sliding_window"),
        (GEMMA3, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        (GEMMA3, {"rope_local_base_freq": 0}, "rope_local_base_freq"),
        (GEMMA3, {"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention"),
    ],
)
def test_what_is_not_served_is_refused_by_name(config: dict[str, Any], changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        read_model_spec(config | changes)
    assert caught.value.field == f"config.json: {field}"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("gemma2", "caps attention scores"),
        ("gemma3", "gemma3_text"),
        ("mixtral", "llama, mistral, qwen2, qwen3, gemma, gemma3_text"),
    ],
)
def test_other_families_are_refused_with_what_is_served(model_type: str, words: str) -> None:
    with pytest.raises(InvalidModel, match=words) as caught:
        read_model_spec(GEMMA | {"model_type": model_type})
    assert caught.value.field == "config.json: model_type"
