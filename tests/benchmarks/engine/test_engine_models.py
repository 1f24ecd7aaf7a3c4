"""The random checkpoints of the benchmarks are sound: for us, and for transformers."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from orchestrator.model_dir.files import read_model_files
from placement.model.hf import read_model_spec
from placement.model.weights import num_parameters
from tests.benchmarks.engine import engine_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_models.checkpoint("null", directory=tmp_path_factory.mktemp("models"))


def test_the_large_shape_is_that_of_the_1_1_b_llama() -> None:
    spec = read_model_spec(engine_models._COMMON | engine_models.SHAPES["llama-1.1b"])
    assert num_parameters(spec) == 1_100_048_384
    assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads) == (2048, 22, 32, 4)
    assert (spec.ffn_size, spec.vocab_size) == (5632, 32000)


def test_checkpoint_is_sound_and_written_once(model: Path) -> None:
    files = read_model_files(model)
    assert num_parameters(files.spec) * 2 <= files.checkpoint_bytes <= num_parameters(files.spec) * 2 + 4096
    written = (model / "model.safetensors").stat().st_mtime_ns
    assert engine_models.checkpoint("null", directory=model.parent) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == written


def test_checkpoint_loads_in_transformers_with_the_weights_that_were_drawn(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    weight = loaded.model.embed_tokens.weight
    assert weight.shape == (32000, 8)
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(loaded.model.norm.weight, torch.ones(8, dtype=torch.bfloat16))


def test_tokenizer_has_every_id_and_gives_text_back(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 32000
    text = "In the beginning: \u00e9t\u00e9, 42."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert all(tokenizer.decode([token_id]) for token_id in range(512, 32000, 97))


def test_the_bound_counts_every_matrix_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "peers"))
    import linears_peer

    spec = read_model_spec(engine_models._COMMON | engine_models.SHAPES["llama-1.1b"])
    norms, embedding = (2 * spec.num_layers + 1) * spec.hidden_size, spec.vocab_size * spec.hidden_size
    matrices = sum(outputs * inputs for outputs, inputs in linears_peer.shapes(spec))
    assert matrices == num_parameters(spec) - norms - embedding
