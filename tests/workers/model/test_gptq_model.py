"""Compares GPTQ checkpoints with transformers run on the weights that they stand for."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from placement.errors import InvalidConfig, InvalidModel
from placement.model.hf import read_model_spec
from placement.model.quantization import Quantization, linear_format, loaded_bytes
from placement.model.specs import DType
from placement.model.weights import HEAD, whole_model
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.quantized import SIZES, config_of, load, load_request, logits_of, oracle_logits, runner
from workers.host.device import open_device
from workers.startup.loading import LoadJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kind of GPTQ checkpoint."""

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = False
    version: str = "gptq"

    @property
    def config(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "checkpoint_format": self.version,
            "lm_head": False,
        }


def words(fields: NDArray[Any], bits: int) -> Tensor:
    """Packs fields along dim 0 into 32-bit words, the first in the lowest bits."""
    result = np.zeros((len(fields) * bits // 32, fields.shape[1]), np.uint32)
    for i in range(32 // bits):
        result |= fields[i :: 32 // bits].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(result.view(np.int32))


def gptq_tensors(weight: NDArray[Any], variant: Variant, seed: int) -> tuple[dict[str, Tensor], NDArray[Any]]:
    """Makes the tensors of one layer, and the weight [O, I] that they stand for. The rounding need not be good."""
    rng = np.random.default_rng(seed)
    num_outputs, num_inputs = weight.shape
    group_size = num_inputs if variant.group_size == -1 else variant.group_size
    groups = np.arange(num_inputs) // group_size
    if variant.desc_act:
        groups = np.random.default_rng(num_inputs).permutation(groups)  # alike for layers that share their input
    num_groups, most = groups.max() + 1, (1 << variant.bits) - 1
    scales, zeros = np.zeros((num_groups, num_outputs), np.float16), np.full((num_groups, num_outputs), most // 2 + 1)
    for g in range(num_groups):
        part = weight[:, groups == g]
        scales[g] = 2 * np.abs(part).max(1) / most
    if not variant.sym:
        zeros = rng.integers(most // 2 - 1, most // 2 + 3, zeros.shape)
    codes = np.clip(np.round(weight.T / scales[groups].astype(np.float64)) + zeros[groups], 0, most).astype(np.int64)
    stored_zeros = zeros - (1 if variant.version == "gptq" else 0)
    tensors = {
        "qweight": words(codes, variant.bits),
        "qzeros": words(stored_zeros.T, variant.bits).T.contiguous(),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return tensors, (scales[groups].astype(np.float64) * (codes - zeros[groups])).T


def write_gptq(source: Path, target: Path, variant: Variant, *, num_files: int = 1) -> dict[str, Tensor]:
    """Writes a GPTQ checkpoint of ``source`` to ``target``, and returns the weights that it stands for."""
    stored = load_file(source / "model.safetensors")
    tensors, meaning = {}, {}
    for seed, (name, tensor) in enumerate(stored.items()):
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        parts, weight = gptq_tensors(tensor.double().numpy(), variant, seed)
        tensors |= {f"{name.removesuffix('weight')}{part}": x for part, x in parts.items()}
        meaning[name] = torch.from_numpy(weight).float()
    (target / "config.json").write_text(json.dumps(config_of(source) | {"quantization_config": variant.config}))
    if num_files == 1:
        save_file(tensors, target / "model.safetensors")
        return meaning
    owners = {name: f"part-{i % num_files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(owners.values()):
        save_file({name: x for name, x in tensors.items() if owners[name] == file}, target / file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))
    return meaning


@pytest.mark.parametrize(
    "variant",
    [
        Variant(),
        Variant(group_size=8),
        Variant(group_size=-1),
        Variant(sym=False),
        Variant(version="gptq_v2", sym=False),
        Variant(bits=8),
        Variant(bits=8, sym=False),
        Variant(desc_act=True),
        Variant(bits=8, desc_act=True, sym=False),
    ],
    ids=str,
)
def test_gptq_logits_are_those_of_the_weights_written_out(
    llama_checkpoint: Callable[..., Path], tmp_path: Path, variant: Variant
) -> None:
    source = llama_checkpoint(**SIZES, attention_bias=True)
    meaning = write_gptq(source, tmp_path, variant)
    linear = linear_format(config_of(tmp_path), Quantization.NONE)
    expected = oracle_logits(source, meaning)
    torch.testing.assert_close(logits_of(tmp_path, linear), expected, atol=1e-4, rtol=1e-4)
    in_bfloat16 = logits_of(tmp_path, linear, torch.bfloat16).float()
    usual = (logits_of(source, None, torch.bfloat16).float() - oracle_logits(source, {})).abs().mean()
    assert (in_bfloat16 - expected).abs().mean() < 1.5 * usual


def test_a_gptq_layer_may_be_spread_over_files(llama_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    single, several = tmp_path / "single", tmp_path / "several"
    single.mkdir()
    several.mkdir()
    source = llama_checkpoint(**SIZES)
    for path, num_files in ((single, 1), (several, 3)):
        write_gptq(source, path, Variant(), num_files=num_files)
    linear = linear_format(config_of(single), Quantization.NONE)
    expected, found = load(single, linear)[0], load(several, linear)
    assert expected.keys() == found[0].keys()
    assert all(torch.equal(found[0][name], tensor) for name, tensor in expected.items())
    total = loaded_bytes(whole_model(read_model_spec(config_of(single))), DType.FLOAT32, linear)
    assert found[1][-1] == (total, total) == (sum(x.nbytes for x in expected.values()),) * 2


def test_gptq_keeps_the_head_of_the_checkpoint(llama_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = llama_checkpoint(**SIZES)
    write_gptq(source, tmp_path, Variant())
    tensors = load(tmp_path, linear_format(config_of(tmp_path), Quantization.NONE))[0]
    assert torch.equal(tensors[HEAD], load_file(source / "model.safetensors")[HEAD])


def refusal(path: Path, *changes: Callable[[dict[str, Tensor]], object]) -> InvalidModel:
    file = path / "model.safetensors"
    tensors = load_file(file)
    for change in changes:
        change(tensors)
    save_file(tensors, file)
    linear = linear_format(config_of(path), Quantization.NONE)
    with pytest.raises(InvalidModel) as caught:
        load(path, linear)
    return caught.value


NAME = "model.layers.1.mlp.up_proj"


def test_gptq_tensors_that_do_not_fit_are_refused(llama_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = llama_checkpoint(**SIZES)

    def refused(*changes: Callable[[dict[str, Tensor]], object], variant: Variant = Variant()) -> InvalidModel:
        write_gptq(source, tmp_path, variant)
        return refusal(tmp_path, *changes)

    field = f"model.safetensors: {NAME}."
    assert refused(lambda x: x.pop(f"{NAME}.qzeros")).field == f"{field}qzeros"
    assert refused(lambda x: x.update({f"{NAME}.scales": torch.ones(1, 1)})).field == f"{field}scales"
    assert refused(lambda x: x.update({f"{NAME}.qweight": x[f"{NAME}.qweight"].long()})).value == "I64"
    unequal = refused(lambda x: x[f"{NAME}.g_idx"].zero_())
    assert (unequal.field, "unequal" in unequal.problem) == (f"{NAME}.weight", True)
    shifted = refused(lambda x: x[f"{NAME}.qzeros"].zero_())
    assert (shifted.field, "zero points" in shifted.problem) == (f"{NAME}.weight", True)


def test_layers_that_share_their_input_must_order_it_alike(
    llama_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    write_gptq(llama_checkpoint(**SIZES), tmp_path, Variant(desc_act=True))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{NAME}.g_idx"] = tensors[f"{NAME}.g_idx"].flip(0)
    save_file(tensors, file)
    with pytest.raises(InvalidModel, match="different orders") as caught:
        runner(tmp_path, linear_format(config_of(tmp_path), Quantization.NONE))
    assert NAME in caught.value.field


def test_a_gptq_model_is_not_rounded_again(served: Path, tmp_path: Path) -> None:
    write_gptq(served, tmp_path, Variant())
    request = load_request(tmp_path, quantization=pb.QUANTIZATION_INT8)
    with pytest.raises(InvalidConfig) as caught:
        LoadJob(request=request, device=open_device("cpu", 1)).run()
    assert caught.value.field == "model.quantization"
