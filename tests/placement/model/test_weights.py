import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.model.hf import read_model_spec
from placement.model.part import Part, Span
from placement.model.quantization import loaded_bytes
from placement.model.specs import DType, ModelSpec, RopeSpec
from placement.model.weights import TensorSlice, num_parameters, shard_tensors, whole_model

MODEL = ModelSpec(
    architecture="llama",
    num_layers=3,
    hidden_size=20,
    num_heads=15,
    num_kv_heads=5,
    head_dim=4,
    ffn_size=14,
    vocab_size=31,
    max_context_tokens=64,
    rms_norm_eps=1e-5,
    rope=RopeSpec(),
    tied_embeddings=False,
)
WHOLE = Part.whole(MODEL)
SUMMED_BIASES = ("o_proj.bias", "down_proj.bias")


def names(slices: tuple[TensorSlice, ...]) -> list[str]:
    return [slice_.name for slice_ in slices]


def spans_of(size: int) -> st.SearchStrategy[list[Span]]:
    """Generates cuts of ``size`` into adjacent spans, some of them empty."""
    cuts = st.lists(st.integers(0, size), max_size=3).map(sorted)
    return cuts.map(lambda inner: [Span(a, b) for a, b in pairwise([0, *inner, size])])


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {
            "attention_bias": True,
            "mlp_bias": True,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 6,
            "hidden_size": 60,
        },
        {"family": "mistral"},
        {"family": "qwen2"},
        {"family": "qwen3"},
        {"family": "qwen3", "attention_bias": True, "head_dim": 24},
        {"family": "gemma"},
        {"family": "gemma3_text"},
    ],
)
def test_the_whole_model_is_what_transformers_writes(
    checkpoint: Callable[..., Path], overrides: dict[str, Any]
) -> None:
    from safetensors import safe_open

    path = checkpoint(**{"family": "llama"} | overrides)
    model = read_model_spec(json.loads((path / "config.json").read_text()))
    with safe_open(path / "model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    slices = whole_model(model)
    assert {slice_.name: slice_.shape for slice_ in slices} == stored
    assert all(slice_.spans == tuple(Span(0, size) for size in slice_.shape) for slice_ in slices)
    assert num_parameters(model) == sum(math.prod(shape) for shape in stored.values())


def test_bytes_follow_the_number_type() -> None:
    slices = whole_model(MODEL)
    assert loaded_bytes(slices, DType.FLOAT32, None) == 4 * num_parameters(MODEL)
    assert loaded_bytes(slices, DType.BFLOAT16, None) == 2 * num_parameters(MODEL)


def test_a_shard_reads_its_heads_and_columns() -> None:
    part = Part(layers=Span(1, 2), kv_heads=Span(1, 3), ffn_columns=Span(4, 14), vocab_rows=Span(0, 0))
    slices = shard_tensors(MODEL, part)
    assert {slice_.name.removeprefix("model.layers.1."): slice_.spans for slice_ in slices} == {
        "input_layernorm.weight": (Span(0, 20),),
        "self_attn.q_proj.weight": (Span(12, 36), Span(0, 20)),
        "self_attn.k_proj.weight": (Span(4, 12), Span(0, 20)),
        "self_attn.v_proj.weight": (Span(4, 12), Span(0, 20)),
        "self_attn.o_proj.weight": (Span(0, 20), Span(12, 36)),
        "post_attention_layernorm.weight": (Span(0, 20),),
        "mlp.gate_proj.weight": (Span(4, 14), Span(0, 20)),
        "mlp.up_proj.weight": (Span(4, 14), Span(0, 20)),
        "mlp.down_proj.weight": (Span(0, 20), Span(4, 14)),
    }


def test_a_shard_holds_the_norms_of_heads_whole_and_the_biases_of_its_own() -> None:
    model = replace(MODEL, qkv_bias=True, qk_norm=True, post_norms=True)
    slices = shard_tensors(model, replace(WHOLE, layers=Span(1, 2), kv_heads=Span(1, 3)))
    spans = {slice_.name.removeprefix("model.layers.1."): slice_.spans for slice_ in slices}
    assert {name: span for name, span in spans.items() if "norm" in name or "bias" in name} == {
        "input_layernorm.weight": (Span(0, 20),),
        "self_attn.q_proj.bias": (Span(12, 36),),
        "self_attn.k_proj.bias": (Span(4, 12),),
        "self_attn.v_proj.bias": (Span(4, 12),),
        "self_attn.q_norm.weight": (Span(0, 4),),
        "self_attn.k_norm.weight": (Span(0, 4),),
        "post_attention_layernorm.weight": (Span(0, 20),),
        "pre_feedforward_layernorm.weight": (Span(0, 20),),
        "post_feedforward_layernorm.weight": (Span(0, 20),),
    }


def test_only_the_first_stage_of_a_pipeline_holds_embedding_norm_and_head() -> None:
    stages = [names(shard_tensors(MODEL, replace(WHOLE, layers=Span(i, i + 1)))) for i in range(3)]
    ends = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert [[name in stage for name in ends] for stage in stages] == [
        [True, True, True],
        [False, False, False],
        [False, False, False],
    ]


def test_a_tied_head_is_the_embedding_again() -> None:
    tied = replace(MODEL, tied_embeddings=True)
    stages = [names(shard_tensors(tied, replace(WHOLE, layers=Span(i, i + 1)))) for i in range(3)]
    assert ["model.embed_tokens.weight" in stage for stage in stages] == [True, False, False]
    assert "lm_head.weight" not in stages[0]
    assert Counter(names(whole_model(tied)))["model.embed_tokens.weight"] == 1


@given(heads=spans_of(5), columns=spans_of(14), rows=spans_of(31), layers=spans_of(3))
def test_shards_tile_every_matrix_exactly_once(
    heads: list[Span], columns: list[Span], rows: list[Span], layers: list[Span]
) -> None:
    """The cuts may be unequal. Every rank of the stage holds the vectors that every rank needs (norms)."""
    model = replace(MODEL, qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=True, post_norms=True)
    num_ranks = max(map(len, (heads, columns, rows)))
    heads, columns, rows = (part + [Span(part[-1].stop, part[-1].stop)] * num_ranks for part in (heads, columns, rows))
    read: Counter[str] = Counter()
    for stage in layers:
        if not len(stage):
            continue
        for rank in range(num_ranks):
            part = Part(layers=stage, kv_heads=heads[rank], ffn_columns=columns[rank], vocab_rows=rows[rank])
            slices = shard_tensors(model, part)
            read.update({slice_.name: slice_.num_elements for slice_ in slices})
    for slice_ in whole_model(model):
        copies = num_ranks if "norm" in slice_.name else 1
        assert read[slice_.name] == copies * slice_.num_elements, slice_.name


def test_summed_biases_are_held_by_one_rank() -> None:
    model = replace(MODEL, output_bias=True, mlp_bias=True)
    first = names(shard_tensors(model, replace(WHOLE, kv_heads=Span(0, 2), ffn_columns=Span(0, 7))))
    second = names(shard_tensors(model, replace(WHOLE, kv_heads=Span(2, 5), ffn_columns=Span(7, 14))))
    assert sum(name.endswith(SUMMED_BIASES) for name in first) == 6
    assert not any(name.endswith(SUMMED_BIASES) for name in second)
