"""Compares models whose linear layers are held in fewer bits with transformers run on the dequantized weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels.rounded import dequantize
from placement.errors import InvalidConfig, InvalidRequest
from placement.model.hf import read_model_spec
from placement.model.quantization import LinearFormat, Quantization, linear_format, loaded_bytes
from placement.model.specs import DType
from placement.model.weights import whole_model
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.quantized import SIZES, config_of, load, load_request, logits_of, oracle_logits
from workers.host.device import open_device
from workers.model.rounded import take_rounded
from workers.startup.loading import LoadJob

INT8, INT4 = (LinearFormat(bits=bits, head_bits=8) for bits in (8, 4))


def rounded_names(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]


def written_out(path: Path, linear: LinearFormat) -> dict[str, Tensor]:
    tensors = load(path, linear)[0]
    rounded = {name: take_rounded(tensors, [name]) for name in rounded_names(tensors)}
    return {f"{name}.weight": dequantize(x, torch.float32) for name, x in rounded.items() if x is not None}


@pytest.mark.parametrize("linear", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
        ("gemma3_text", {"head_dim": 32}),
    ],
)
def test_logits_are_those_of_the_rounded_weights(
    checkpoint: Callable[..., Path], linear: LinearFormat, family: str, more: dict[str, Any]
) -> None:
    path = checkpoint(family, **SIZES | more)
    expected = oracle_logits(path, written_out(path, linear))
    torch.testing.assert_close(logits_of(path, linear), expected, atol=1e-4, rtol=1e-4)
    in_bfloat16 = logits_of(path, linear, torch.bfloat16).float()
    plain = logits_of(path, None, torch.bfloat16).float()
    usual = (plain - oracle_logits(path, {})).abs().mean()  # what bfloat16 does to the logits without rounding
    assert (in_bfloat16 - expected).abs().mean() < 1.5 * usual


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("linear", [INT8, INT4], ids=["int8", "int4"])
def test_layers_and_head_are_rounded_and_nothing_else(
    checkpoint: Callable[..., Path], linear: LinearFormat, tied: bool
) -> None:
    path = checkpoint("llama", **SIZES, tie_word_embeddings=tied, dtype="bfloat16")
    tensors, reported = load(path, linear, torch.bfloat16)
    layers = [f"model.layers.{i}.{x}_proj" for i in range(2) for x in ("self_attn.q", "self_attn.k", "self_attn.v",
              "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")]  # fmt: skip
    assert sorted(rounded_names(tensors)) == sorted([*layers, "lm_head"])
    stored = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name in stored}
    assert set(kept) == {name for name in stored if "norm" in name or "embed" in name}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in kept.items())
    assert tensors["lm_head.codes"].dtype == torch.int8
    total = loaded_bytes(whole_model(read_model_spec(config_of(path))), DType.BFLOAT16, linear)
    assert sum(tensor.nbytes for tensor in tensors.values()) == total
    assert reported[-1] == (total, total)


@pytest.mark.parametrize(
    ("setting", "asked"), [(pb.QUANTIZATION_INT8, Quantization.INT8), (pb.QUANTIZATION_INT4, Quantization.INT4)]
)
def test_a_rank_says_what_its_rounded_weights_take(
    served: Path, setting: pb.Quantization.ValueType, asked: Quantization
) -> None:
    job = LoadJob(request=load_request(served, quantization=setting), device=open_device("cpu", 1))
    loaded = job.run()
    config = config_of(served)
    expected = loaded_bytes(whole_model(read_model_spec(config)), DType.BFLOAT16, linear_format(config, asked))
    assert loaded.weight_bytes == expected
    assert job.total_bytes == expected < loaded_bytes(whole_model(read_model_spec(config)), DType.BFLOAT16, None)


def test_an_unknown_quantization_is_refused(served: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LoadJob(request=load_request(served, quantization=9), device=open_device("cpu", 1)).run()  # type: ignore[arg-type]
    assert caught.value.field == "quantization"


def test_a_width_without_groups_is_refused_before_anything_is_read(llama_checkpoint: Callable[..., Path]) -> None:
    path = llama_checkpoint(**SIZES | {"intermediate_size": 100})
    request = load_request(path, quantization=pb.QUANTIZATION_INT4)
    request.shard.ffn_columns.stop = 100
    (path / "model.safetensors").unlink()
    with pytest.raises(InvalidConfig) as caught:
        LoadJob(request=request, device=open_device("cpu", 1)).run()
    assert caught.value.field == "model.quantization"
    assert "model.layers.0.mlp.down_proj.weight has 100" in caught.value.problem
