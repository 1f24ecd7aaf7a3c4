"""A small model directory with weights of zero, and its checks before any process starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from orchestrator.config.document import Config, load_config
from orchestrator.deployment.known_cluster import Machine
from orchestrator.deployment.preflight import Checked, preflight
from placement.errors import FieldError
from placement.model.hf import read_model_spec
from placement.model.weights import whole_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
MACHINE = Machine(memory_bytes=2**36, num_cores=8)


def save_words(directory: Path, vocab: dict[str, int]) -> None:
    """Writes a tokenizer that knows these words."""
    Tokenizer(WordLevel(vocab, unk_token="a")).save(str(directory / "tokenizer.json"))


def tensors(**changes: Any) -> dict[str, np.ndarray]:
    """Returns all weights of the model, by name."""
    wanted = whole_model(read_model_spec(CONFIG))
    return {item.name: np.zeros(item.shape, np.float32) for item in wanted} | changes


def configured(directory: Path, **sections: Any) -> Config:
    """Returns a configuration that serves the model on any free port."""
    file = directory.parent / "cluster.yaml"
    sections = {"gateway": {"address": "127.0.0.1:0"}} | sections
    file.write_text(json.dumps({"model": {"path": str(directory)}} | sections))
    return load_config(file, environ={})


def check(directory: Path, **sections: Any) -> Checked:
    """Checks such a configuration for a machine of 64 GiB and 8 cores."""
    return preflight(configured(directory, **sections), machine=MACHINE)


def refused(kind: type[FieldError], act: Callable[[], object]) -> FieldError:
    """Returns the refusal, of just this kind, that ``act`` ends in."""
    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    return caught.value


def make_model(directory: Path) -> Path:
    """Writes the model of ``CONFIG`` below ``directory``."""
    directory = directory / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    save_words(directory, {"a": 0, "b": 19})
    save_file(tensors(), directory / "model.safetensors")
    return directory
