"""Models whose linear layers are held in fewer bits, against transformers run on the weights written out."""

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
from transformers import AutoModelForCausalLM

from kernels.rounded import dequantize
from kernels.select import kernels_for
from placement.errors import InvalidConfig, InvalidModel, InvalidRequest
from placement.model.hf import read_model_spec
from placement.model.quantization import LinearFormat, Quantization, linear_format, loaded_bytes
from placement.model.specs import DType
from placement.model.weights import HEAD, whole_model
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.steps import logits
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.model.rounded import take_rounded
from workers.startup.checkpoint import load_weights
from workers.startup.loading import LoadJob
from workers.step.runner import ModelRunner
from workers.step.types import SequenceInput

SIZES = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6, "num_key_value_heads": 2}
PROMPT = [7 * i % 509 for i in range(80)]
CPU = torch.device("cpu")
INT8, INT4 = (LinearFormat(bits=bits, head_bits=8) for bits in (8, 4))


def config_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content


def load(
    path: Path, linear: LinearFormat | None, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    reported: list[tuple[int, int]] = []
    slices = whole_model(read_model_spec(config_of(path)))
    return load_weights(path, slices, dtype, CPU, lambda *counts: reported.append(counts), linear), reported


def runner(path: Path, linear: LinearFormat | None, dtype: torch.dtype = torch.float32) -> ModelRunner:
    device, model = open_device("cpu", 1), read_model_spec(config_of(path))
    return ModelRunner(
        model=model,
        weights=load(path, linear, dtype)[0],
        cache=allocate_kv_cache(model, num_slots=256, dtype=dtype, device=device),
        device=CPU,
        kernels=kernels_for("cpu"),
    )


def logits_of(path: Path, linear: LinearFormat | None, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(runner(path, linear, dtype), [SequenceInput(token_ids=PROMPT, start=0, runs=((3, 83),))])


@torch.inference_mode()
def oracle_logits(path: Path, written_out: dict[str, Tensor]) -> Tensor:
    """Transformers with some of the weights replaced; a tied head stays apart from the embedding."""
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, weight in written_out.items():
        module = oracle.get_submodule(name.removesuffix(".weight"))
        assert module.weight.shape == weight.shape, name
        module.weight = torch.nn.Parameter(weight)
    result: Tensor = oracle(torch.tensor([PROMPT])).logits[0]
    return result


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


def load_request(path: Path, **more: Any) -> pb.LoadRequest:
    shard = pb.Shard(layers={"stop": 2}, kv_heads={"stop": 2}, ffn_columns={"stop": 192}, vocab_rows={"stop": 509})
    sizes = {"block_size": 8, "num_blocks": 64, "token_budget": 32, "max_num_seqs": 8, "max_context_tokens": 256}
    return pb.LoadRequest(model_path=str(path), dtype=pb.DTYPE_BFLOAT16, shard=shard, **sizes | more)


@pytest.fixture(scope="module")
def served(llama_checkpoint: Callable[..., Path]) -> Path:
    from tests.support.tokenizer import save_tokenizer

    directory = llama_checkpoint(seed=11, **SIZES)
    save_tokenizer(directory)
    return directory


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
    """Fields along dim 0 as 32-bit words, the first in the lowest bits."""
    result = np.zeros((len(fields) * bits // 32, fields.shape[1]), np.uint32)
    for i in range(32 // bits):
        result |= fields[i :: 32 // bits].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(result.view(np.int32))


def gptq_tensors(weight: NDArray[Any], variant: Variant, seed: int) -> tuple[dict[str, Tensor], NDArray[Any]]:
    """The tensors of one layer, and the weight [O, I] that they stand for; rounding needs not be good."""
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
    """A GPTQ checkpoint of ``source`` in ``target``; the weights it stands for."""
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
