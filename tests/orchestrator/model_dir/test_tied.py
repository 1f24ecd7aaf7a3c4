"""Whether the embedding is the output head too: by the configuration and by the files, as transformers decides it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from orchestrator.model_dir import stored
from orchestrator.model_dir.checkpoint import HEAD_DIFFERS
from orchestrator.model_dir.files import read_model_files
from orchestrator.model_dir.stored import are_equal, read_header
from placement.errors import InvalidModel
from placement.model.checkpoint_files import INDEX_FILE, SINGLE_FILE
from placement.model.weights import EMBEDDING, HEAD, num_parameters
from tests.support.tokenizer import save_tokenizer

Change = Callable[[dict[str, Tensor]], None]


def trained(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = torch.randn_like(weights[EMBEDDING])


def trained_at_its_end(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = weights[EMBEDDING].clone()
    weights[HEAD][-1, -1] += 1.0


def copied(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = weights[EMBEDDING].clone()


def copied_in_float32(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = weights[EMBEDDING].float()


def absent(weights: dict[str, Tensor]) -> None:
    weights.pop(HEAD, None)


def in_its_place(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = weights.pop(EMBEDDING)


def model_with(path: Path, change: Change, **config: Any) -> Path:
    """The checkpoint with other weights and another configuration."""
    weights = load_file(path / SINGLE_FILE)
    change(weights)
    save_file(weights, path / SINGLE_FILE, metadata={"format": "pt"})
    values = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    save_tokenizer(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [trained, trained_at_its_end, copied, absent, in_its_place])
@pytest.mark.parametrize(("family", "said"), [("llama", True), ("gemma", None)])
def test_the_files_are_believed_where_both_are_saved(
    checkpoint: Callable[..., Path], family: str, said: bool | None, change: Change, dtype: str
) -> None:
    path = checkpoint(family, tie_word_embeddings=True, dtype=dtype)
    model_with(path, change, tie_word_embeddings=said)
    files = read_model_files(path)
    oracle = AutoModelForCausalLM.from_pretrained(path)
    assert files.spec.tied_embeddings == (oracle.lm_head.weight is oracle.model.embed_tokens.weight)
    assert files.spec.tied_embeddings == (change not in (trained, trained_at_its_end))
    assert files.warnings == (() if files.spec.tied_embeddings else (HEAD_DIFFERS,))
    assert num_parameters(files.spec) == sum(parameter.numel() for parameter in oracle.parameters())


def test_what_was_decided_is_not_looked_for_again(
    llama_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_with(llama_checkpoint(tie_word_embeddings=True), trained)
    monkeypatch.delattr("orchestrator.model_dir.checkpoint.are_equal")
    for is_tied in (True, False):
        assert read_model_files(path, tied_embeddings=is_tied).spec.tied_embeddings == is_tied


def test_number_types_may_differ(llama_checkpoint: Callable[..., Path]) -> None:
    path = llama_checkpoint(tie_word_embeddings=True, dtype="bfloat16")
    assert read_model_files(model_with(path, copied_in_float32)).spec.tied_embeddings
    assert not read_model_files(model_with(path, trained)).spec.tied_embeddings


def test_the_head_may_be_in_another_file(llama_checkpoint: Callable[..., Path]) -> None:
    path = model_with(llama_checkpoint(tie_word_embeddings=True), absent)
    weights = load_file(path / SINGLE_FILE)
    (path / SINGLE_FILE).unlink()
    save_file(weights, path / "a.safetensors")
    owners = dict.fromkeys(weights, "a.safetensors") | {HEAD: "b.safetensors"}
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": owners}))
    for head, is_tied in ((weights[EMBEDDING].clone(), True), (weights[EMBEDDING] + 1, False)):
        save_file({HEAD: head}, path / "b.safetensors")
        assert read_model_files(path).spec.tied_embeddings == is_tied


def test_a_model_that_is_not_tied_must_have_a_head(llama_checkpoint: Callable[..., Path]) -> None:
    """Transformers draws one at random, and says so in a log."""
    for said in (False, None):
        path = model_with(llama_checkpoint(tie_word_embeddings=True), absent, tie_word_embeddings=said)
        with pytest.raises(InvalidModel) as caught:
            read_model_files(path)
        assert (caught.value.field, caught.value.problem) == (SINGLE_FILE, f"lacks the tensor {HEAD}")
        assert "Set tie_word_embeddings to true" in caught.value.fix


def test_a_model_that_is_not_tied_must_have_an_embedding(llama_checkpoint: Callable[..., Path]) -> None:
    path = model_with(llama_checkpoint(), lambda weights: weights.pop(EMBEDDING))
    with pytest.raises(InvalidModel) as caught:
        read_model_files(path)
    assert caught.value.problem == f"lacks the tensor {EMBEDDING}"


def test_a_head_of_another_shape_is_refused(llama_checkpoint: Callable[..., Path]) -> None:
    def widened(weights: dict[str, Tensor]) -> None:
        weights[HEAD] = torch.cat([weights[EMBEDDING], weights[EMBEDDING][:3]])

    with pytest.raises(InvalidModel, match=rf"{HEAD}: has another shape"):
        read_model_files(model_with(llama_checkpoint(tie_word_embeddings=True), widened))


@pytest.mark.parametrize("place", [0, 1, 99, 100, 5000, 9998, 9999])
def test_one_number_that_differs_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    for name, size in (("_BLOCK_ELEMENTS", 700), ("_NUM_SAMPLES", 3), ("_SAMPLE_ELEMENTS", 10)):
        monkeypatch.setattr(stored, name, size)
    one = torch.randn(100, 100).to(torch.bfloat16)
    other = one.clone()
    other.view(-1)[place] += 1
    save_file({"one": one, "same": one.clone(), "other": other, "wide": one.float()}, tmp_path / "a.safetensors")
    tensors = read_header(tmp_path, "a.safetensors")
    assert are_equal(tensors["one"], tensors["same"]) and are_equal(tensors["one"], tensors["wide"])
    assert not are_equal(tensors["one"], tensors["other"]) and not are_equal(tensors["wide"], tensors["other"])
