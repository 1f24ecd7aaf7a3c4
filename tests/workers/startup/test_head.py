"""A rank takes the head that the orchestrator found, and the tensors that a tied pair was saved as."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from placement.model.checkpoint_files import SINGLE_FILE
from placement.model.weights import EMBEDDING, HEAD, num_parameters, shard_tensors, whole_model
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from tests.support.oracle import continue_greedily, greedy
from tests.support.worker import load_request
from workers.host.device import open_device
from workers.startup.checkpoint import load_weights
from workers.startup.checks import check_load
from workers.step.runner import ModelRunner

PROMPT = [5, 17, 300, 42, 8]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    weights = load_file(path / SINGLE_FILE)
    change(weights)
    save_file(weights, path / SINGLE_FILE, metadata={"format": "pt"})
    return path


@contextmanager
def configured(path: Path, **changes: object) -> Iterator[None]:
    """Within, config.json says something else."""
    before = (path / "config.json").read_text()
    (path / "config.json").write_text(json.dumps(json.loads(before) | changes))
    yield
    (path / "config.json").write_text(before)


def test_all_ranks_go_by_what_was_decided_once(llama_checkpoint: Callable[..., Path]) -> None:
    path = llama_checkpoint(tie_word_embeddings=True)
    device = open_device("cpu", 1)
    alone = check_load(load_request(path), device)
    facts = pb.ModelFacts(eos_token_ids=[2, 7], tied_embeddings=False)
    told = check_load(load_request(path, facts=facts), device)
    assert (alone.model.tied_embeddings, alone.model.eos_token_ids) == (True, (2,))
    assert (told.model.tied_embeddings, told.model.eos_token_ids) == (False, (2, 7))
    head = HEAD in [slice_.name for slice_ in shard_tensors(told.model, told.roster.part)]
    assert head and num_parameters(told.model) > num_parameters(alone.model)
    assert told.need.weight_bytes > alone.need.weight_bytes


def test_a_head_that_is_not_the_embedding_answers_as_in_transformers(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    def train(weights: dict[str, torch.Tensor]) -> None:
        weights[HEAD] = torch.randn_like(weights[EMBEDDING])

    path = rewrite(llama_checkpoint(tie_word_embeddings=True), train)
    expected = greedy(AutoModelForCausalLM.from_pretrained(path), PROMPT, 16)
    with configured(path, tie_word_embeddings=False):
        assert continue_greedily(make_runner(path), [PROMPT], 8, 16) == [expected]


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_a_tied_pair_may_be_saved_as_the_head(
    llama_checkpoint: Callable[..., Path], make_runner: Any, max_shard_size: str
) -> None:
    """Transformers ties either to the other."""
    path = llama_checkpoint(tie_word_embeddings=True, max_shard_size=max_shard_size)
    expected = greedy(AutoModelForCausalLM.from_pretrained(path), PROMPT, 16)
    for file in path.glob("*.safetensors"):
        weights = load_file(file)
        save_file({HEAD if name == EMBEDDING else name: tensor for name, tensor in weights.items()}, file)
    for index in path.glob("*.index.json"):
        index.write_text(index.read_text().replace(EMBEDDING, HEAD))
    runner = make_runner(path)
    assert continue_greedily(runner, [PROMPT], 8, 16) == [expected]
    slices = whole_model(check_load(load_request(path), open_device("cpu", 1)).model)
    read = load_weights(path, slices, torch.float32, torch.device("cpu"), lambda loaded, total: None)
    assert EMBEDDING in read and HEAD not in read
