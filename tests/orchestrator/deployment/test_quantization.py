"""``model.quantization`` from the cluster file to the request that a rank loads by."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from orchestrator.config.document import Config, load_config
from orchestrator.controller.settings import DeploymentSettings
from orchestrator.deployment.known_cluster import Machine
from orchestrator.deployment.preflight import Checked, preflight
from placement.errors import InvalidConfig, InvalidModel
from placement.model.hf import read_model_spec
from placement.model.quantization import Quantization, checkpoint_tensors, linear_format, loaded_bytes
from placement.model.specs import DType
from placement.model.weights import whole_model
from protos.heterodyne.worker.v1 import worker_pb2 as pb

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
REQUESTS = {
    "none": pb.QUANTIZATION_UNSPECIFIED,
    "int8": pb.QUANTIZATION_INT8,
    "int4": pb.QUANTIZATION_INT4,
}


def write_model(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    content = MODEL | changes
    (directory / "config.json").write_text(json.dumps(content))
    Tokenizer(WordLevel({"a": 0, "b": 19}, unk_token="a")).save(str(directory / "tokenizer.json"))
    wanted = whole_model(read_model_spec(content))
    save_file({item.name: np.zeros(item.shape, np.float32) for item in wanted}, directory / "model.safetensors")
    return directory


def configured(directory: Path, **model: Any) -> Config:
    file = directory.parent / "cluster.yaml"
    content = {"model": {"path": str(directory)} | model, "gateway": {"address": "127.0.0.1:0"}}
    file.write_text(json.dumps(content))
    return load_config(file, environ={})


def check(directory: Path, **model: Any) -> Checked:
    return preflight(configured(directory, **model), machine=Machine(memory_bytes=2**36, num_cores=2))


def test_models_are_served_as_they_are_by_default(tmp_path: Path) -> None:
    assert configured(write_model(tmp_path / "model")).model.quantization == "none"


@pytest.mark.parametrize("value", ["int3", "INT8", 8, True, None])
def test_other_values_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(InvalidConfig) as caught:
        configured(write_model(tmp_path / "model"), quantization=value)
    assert caught.value.field == "model.quantization"


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_plan_has_the_bytes_of_rounded_weights(tmp_path: Path, quantization: str) -> None:
    checked = check(write_model(tmp_path / "model"), quantization=quantization)
    linear = linear_format(MODEL, Quantization(quantization))
    expected = loaded_bytes(whole_model(checked.model), DType.BFLOAT16, linear)
    assert [replica.leader.weight_bytes for replica in checked.plan.replicas] == [expected]


def test_fewer_bits_take_fewer_bytes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    plans = [check(path, quantization=quantization).plan for quantization in ("none", "int8", "int4")]
    sizes = [plan.replicas[0].leader.weight_bytes for plan in plans]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_layer_that_cannot_be_cut_into_groups_is_refused_before_the_launch(tmp_path: Path, quantization: str) -> None:
    path = write_model(tmp_path / "model", intermediate_size=100)
    with pytest.raises(InvalidConfig) as caught:
        check(path, quantization=quantization)
    assert (caught.value.field, caught.value.value) == ("model.quantization", quantization)
    assert "model.layers.0.mlp.down_proj.weight has 100" in caught.value.problem


def test_a_quantized_checkpoint_of_another_method_is_refused_before_the_launch(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    (path / "config.json").write_text(json.dumps(MODEL | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(InvalidModel) as caught:
        check(path)
    assert caught.value.field == "config.json: quantization_config.quant_method"


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_ranks_are_told_to_round(tmp_path: Path, quantization: str) -> None:
    plan = check(write_model(tmp_path / "model"), quantization=quantization).plan
    settings = DeploymentSettings(
        plan=plan,
        model_path="/model",
        load_timeout_s=1.0,
    )
    request = settings.load_request("replica-0", plan.replicas[0].leader, epoch=1)
    assert request.quantization == REQUESTS[quantization]


GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}}
TYPES = {"I32": np.int32, "F32": np.float32}


def write_gptq_model(directory: Path) -> Path:
    """A model whose layers are words, all zeros: headers are read, no weights."""
    write_model(directory)
    (directory / "config.json").write_text(json.dumps(MODEL | GPTQ))
    wanted = checkpoint_tensors(whole_model(read_model_spec(MODEL)), linear_format(GPTQ, Quantization.NONE))
    tensors = {part.name: np.zeros(part.shape, TYPES[dtypes[0]]) for part, dtypes in wanted}
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_gptq_checkpoint_is_planned_by_its_words(tmp_path: Path) -> None:
    checked = check(write_gptq_model(tmp_path / "model"))
    linear = linear_format(GPTQ, Quantization.NONE)
    assert checked.plan.replicas[0].leader.weight_bytes == loaded_bytes(
        whole_model(checked.model), DType.BFLOAT16, linear
    )


def test_a_gptq_checkpoint_without_its_words_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model")
    (path / "config.json").write_text(json.dumps(MODEL | GPTQ))
    with pytest.raises(InvalidModel) as caught:
        check(path)
    assert "lacks the tensor model.layers.0.self_attn.q_proj.scales" in str(caught.value)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_gptq_checkpoint_is_not_rounded_again(tmp_path: Path, quantization: str) -> None:
    path = write_gptq_model(tmp_path / "model")
    with pytest.raises(InvalidConfig) as caught:
        check(path, quantization=quantization)
    assert (caught.value.field, caught.value.value) == ("model.quantization", quantization)
