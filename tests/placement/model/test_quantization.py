"""Checks the groups in which weights are rounded, their bytes, and which GPTQ checkpoints are understood."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from placement.errors import InvalidConfig, InvalidModel
from placement.model.hf import read_model_spec
from placement.model.part import Part, Span
from placement.model.quantization import (
    GptqLayout,
    LinearFormat,
    Quantization,
    check_linear_format,
    checkpoint_tensors,
    gptq_tensors,
    linear_format,
    loaded_bytes,
    read_gptq,
)
from placement.model.specs import DType, ModelSpec, RopeSpec
from placement.model.weights import TensorSlice, shard_tensors, whole_model
from placement.planning.limits import ReplicaLimits
from placement.planning.memory import WIDENED_BYTES, footprint

LEAST = ReplicaLimits(block_size=16, token_budget=1, max_num_seqs=1)

MODEL = ModelSpec(
    architecture="llama",
    num_layers=2,
    hidden_size=256,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    ffn_size=704,
    vocab_size=100,
    max_context_tokens=512,
    rms_norm_eps=1e-5,
    rope=RopeSpec(),
    tied_embeddings=False,
)
TIED = replace(MODEL, tied_embeddings=True)
GPTQ: Mapping[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
UP = TensorSlice(name="model.layers.0.mlp.up_proj.weight", shape=(704, 256), spans=(Span(0, 704), Span(0, 256)))


def config(**changes: Any) -> dict[str, Any]:
    return {"quantization_config": {**GPTQ, **changes}}


def gptq(**changes: Any) -> LinearFormat:
    linear = read_gptq(config(**changes))
    assert linear is not None
    return linear


@pytest.mark.parametrize(
    ("quantization", "linear"),
    [
        (Quantization.NONE, None),
        (Quantization.INT8, LinearFormat(bits=8, head_bits=8)),
        (Quantization.INT4, LinearFormat(bits=4, head_bits=8)),
    ],
)
def test_layers_and_head_are_rounded_as_asked(quantization: Quantization, linear: LinearFormat | None) -> None:
    assert linear_format({}, quantization) == linear


@pytest.mark.parametrize(
    ("num_columns", "group_size"),
    [(4096, 128), (11008, 128), (704, 64), (96, 32), (32, 32), (100, None), (16, None)],
)
def test_groups_are_the_largest_that_divide_the_columns(num_columns: int, group_size: int | None) -> None:
    assert LinearFormat(bits=4).group_size(num_columns) == group_size


def test_bytes_of_rounded_layers_are_codes_and_scales() -> None:
    attention = 2 * (256 + 64 + 64 + 256) * 256
    feed_forward = 2 * 3 * 256 * 704
    head, norms = 100 * 256, 5 * 256
    scales = 4 * (attention // 128 + 2 * 2 * 704 * 256 // 128 + 2 * 256 * 704 // 64)  # 704 columns are cut into 64s
    for bits in (4, 8):
        linear = LinearFormat(bits=8 if bits == 8 else 4, head_bits=8)
        rest = 2 * (100 * 256 + norms) + head + 4 * head // 128
        expected = (attention + feed_forward) * bits // 8 + scales + rest
        assert loaded_bytes(whole_model(MODEL), DType.BFLOAT16, linear) == expected
        tied = expected  # the embedding stays, and its rounded copy is the head
        assert loaded_bytes(whole_model(TIED), DType.BFLOAT16, linear) == tied


def test_a_stage_without_the_head_has_no_bytes_of_it() -> None:
    second = shard_tensors(TIED, replace(Part.whole(TIED), layers=Span(1, 2)))
    linear = LinearFormat(bits=4, head_bits=8)
    without = LinearFormat(bits=4)
    assert loaded_bytes(second, DType.BFLOAT16, linear) == loaded_bytes(second, DType.BFLOAT16, without)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_footprint_has_the_rounded_bytes_and_one_head(on_cpu: bool) -> None:
    def need(linear: LinearFormat | None) -> tuple[int, int]:
        found = footprint(
            TIED, Part.whole(TIED), dtype=DType.BFLOAT16, kv_bytes=0, limits=LEAST, on_cpu=on_cpu,
            linear=linear,
        )  # fmt: skip
        return found.weight_bytes, found.workspace_bytes

    rounded, plain = LinearFormat(bits=4, head_bits=8), need(None)
    assert need(rounded)[0] == loaded_bytes(whole_model(TIED), DType.BFLOAT16, rounded)
    assert need(rounded)[1] - plain[1] == (0 if on_cpu else 2 * WIDENED_BYTES)
    packed_head = 100 * 256 * 2 if on_cpu else 0
    assert need(gptq())[0] == loaded_bytes(whole_model(TIED), DType.BFLOAT16, gptq()) + packed_head


def test_columns_that_make_no_groups_are_refused_by_the_layers_name() -> None:
    slices = whole_model(replace(MODEL, ffn_size=720))
    for linear in (LinearFormat(bits=8, head_bits=8), LinearFormat(bits=4, head_bits=8)):
        with pytest.raises(InvalidConfig) as caught:
            check_linear_format(slices, linear)
        assert (caught.value.field, caught.value.value) == ("model.quantization", f"int{linear.bits}")
        assert "model.layers.0.mlp.down_proj.weight has 720" in caught.value.problem
    check_linear_format(slices, None)
    check_linear_format(whole_model(MODEL), LinearFormat(bits=4, head_bits=8))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, LinearFormat(bits=4, gptq=GptqLayout(group_size=64, zero_shift=1, ordered=False))),
        (
            {"group_size": -1, "desc_act": True, "checkpoint_format": "gptq_v2"},
            LinearFormat(bits=4, gptq=GptqLayout(group_size=None, zero_shift=0, ordered=True)),
        ),
        (
            {"bits": 8, "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False, "dynamic": None},
            LinearFormat(bits=8, offsets=True, gptq=GptqLayout(group_size=64, zero_shift=1, ordered=False)),
        ),
        (
            {"sym": False},
            LinearFormat(bits=4, offsets=True, gptq=GptqLayout(group_size=64, zero_shift=1, ordered=False)),
        ),
    ],
)
def test_gptq_is_understood(changes: dict[str, Any], expected: LinearFormat) -> None:
    assert linear_format(config(**changes), Quantization.NONE) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "awq"),
        ("quant_method", None),
        ("bits", 3),
        ("bits", "4"),
        ("bits", True),
        ("group_size", 0),
        ("group_size", -2),
        ("group_size", 20),
        ("group_size", True),
        ("group_size", None),
        ("group_size", "128"),
        ("checkpoint_format", "marlin"),
        ("pack_dtype", "int16"),
        ("lm_head", True),
        ("dynamic", {"+:mlp": {"bits": 8}}),
        ("sym", 1),
        ("desc_act", "no"),
    ],
)
def test_other_quantizations_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(InvalidModel) as caught:
        linear_format(config(**{key: value}), Quantization.NONE)
    assert caught.value.field == f"config.json: quantization_config.{key}"
    assert caught.value.fix


def test_the_models_specification_checks_it_too() -> None:
    sizes = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 20, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    assert read_model_spec(sizes | config()) == read_model_spec(sizes)
    with pytest.raises(InvalidModel, match="quant_method"):
        read_model_spec(sizes | config(quant_method="awq"))


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.INT4])
def test_gptq_weights_are_not_rounded_again(quantization: Quantization) -> None:
    with pytest.raises(InvalidConfig) as caught:
        linear_format(config(), quantization)
    assert (caught.value.field, caught.value.value) == ("model.quantization", quantization.value)
    assert "none" in caught.value.fix


def test_gptq_tensors_lie_words_along_columns_and_groups_along_rows() -> None:
    tensors = gptq_tensors(UP, gptq())
    assert [(part.name.removeprefix("model.layers.0.mlp.up_proj."), part.shape) for part in tensors.all] == [
        ("qweight", (32, 704)),
        ("qzeros", (4, 88)),
        ("scales", (4, 704)),
        ("g_idx", (256,)),
    ]
    assert gptq_tensors(UP, gptq(bits=8)).codes.shape == (64, 704)
    assert gptq_tensors(UP, gptq(group_size=-1)).scales.shape == (1, 704)


def test_gptq_tensors_are_cut_with_their_weight() -> None:
    part = replace(UP, spans=(Span(8, 24), Span(64, 192)))
    tensors = gptq_tensors(part, gptq())
    assert tensors.codes.spans == (Span(8, 24), Span(8, 24))
    assert tensors.zeros.spans == (Span(1, 3), Span(1, 3))
    assert tensors.scales.spans == (Span(1, 3), Span(8, 24))
    assert tensors.groups.spans == (Span(64, 192),)


@pytest.mark.parametrize(
    ("changes", "spans", "dim"),
    [
        ({}, (Span(4, 16), Span(0, 256)), "rows"),
        ({}, (Span(0, 704), Span(0, 100)), "columns"),
        ({}, (Span(0, 704), Span(32, 128)), "columns"),
        ({"group_size": -1}, (Span(0, 704), Span(0, 128)), "columns"),
        ({"desc_act": True}, (Span(0, 704), Span(0, 128)), "columns"),
    ],
)
def test_a_cut_through_a_word_or_group_is_refused_by_its_dim(
    changes: dict[str, Any], spans: tuple[Span, Span], dim: str
) -> None:
    with pytest.raises(InvalidModel) as caught:
        gptq_tensors(replace(UP, spans=spans), gptq(**changes))
    assert caught.value.field == f"{UP.name}: {dim}"


@pytest.mark.parametrize("changes", [{"ffn_size": 708}, {"hidden_size": 250}])
def test_layers_that_make_no_whole_groups_or_words_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InvalidModel) as caught:
        check_linear_format(whole_model(replace(MODEL, **changes)), gptq())
    assert caught.value.field == "config.json: quantization_config.group_size"


def test_the_files_of_a_gptq_checkpoint_have_words_for_the_layers_only() -> None:
    found = {part.name: dtypes for part, dtypes in checkpoint_tensors(whole_model(MODEL), gptq())}
    layer = "model.layers.1.self_attn.o_proj"
    assert [found[f"{layer}.{part}"] for part in ("qweight", "qzeros", "g_idx")] == [("I32",)] * 3
    assert found[f"{layer}.scales"] == found["lm_head.weight"] == ("F32", "F16", "BF16")
    assert f"{layer}.weight" not in found
    plain = [part for part, _ in checkpoint_tensors(whole_model(MODEL), LinearFormat(bits=4, head_bits=8))]
    assert plain == list(whole_model(MODEL))
