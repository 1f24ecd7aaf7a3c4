"""Checks ladder residuals, which add each update one later, in one process and over ranks."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from placement.errors import InvalidConfig, InvalidModel
from placement.model.hf import read_model_spec
from placement.planning.layout import ReplicaLayout, StageLayout, cut
from tests.support.oracle import WIDE
from tests.support.ranks import Ranks, ranks, read_model
from workers.step.runner import ModelRunner

TOKEN_IDS = [i * 31 % 509 for i in range(120)]
RUNS = ((8, 128),)
SPLITS: dict[str, tuple[int, ...]] = {"one": (1,), "even": (1, 1), "5:2:1": (5, 2, 1)}


def declare(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"ladder_residual": True}))


@pytest.fixture(scope="module")
def path(checkpoint: Callable[..., Path]) -> Path:
    directory = checkpoint("llama", num_hidden_layers=4, seed=5)
    declare(directory)
    return directory


@torch.inference_mode()
def by_modules(oracle: PreTrainedModel) -> Tensor:
    """Computes log-probabilities [T, V] by the modules of transformers, put together as a ladder."""
    model = oracle.model
    x = model.embed_tokens(torch.tensor([TOKEN_IDS]))
    turns = model.rotary_emb(x, torch.arange(len(TOKEN_IDS))[None])
    updates: list[Tensor] = []

    def added(residual: Tensor) -> Tensor:
        return residual + updates[-2] if len(updates) > 1 else residual

    for layer in model.layers:
        x = added(x)
        attended = layer.self_attn(layer.input_layernorm(x), position_embeddings=turns, attention_mask=None)[0]
        updates.append(attended)
        x = added(x)
        updates.append(layer.mlp(layer.post_attention_layernorm(x)))
    logits: Tensor = oracle.lm_head(model.norm(x + updates[-2] + updates[-1]))[0]
    return logits.log_softmax(dim=-1)


@pytest.fixture(scope="module", params=SPLITS)
def ladder(request: pytest.FixtureRequest, path: Path) -> Iterator[Ranks]:
    with ranks(path, SPLITS[request.param]) as made:
        yield made


def test_a_ladder_over_ranks_is_that_of_one_process(ladder: Ranks, path: Path) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = by_modules(oracle)
    torch.testing.assert_close(ladder.log_probs(TOKEN_IDS, RUNS), expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        plain = oracle(torch.tensor([TOKEN_IDS])).logits[0].log_softmax(dim=-1)
    assert not torch.allclose(plain, expected, atol=1e-2, rtol=1e-2), "another function than without the ladder"


@pytest.mark.parametrize("split", ["tensor", "sequence"])
def test_layers_that_run_as_one_program_do_so_as_a_ladder(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner], split: str
) -> None:
    directory = llama_checkpoint(seed=6, num_hidden_layers=3, **WIDE)
    declare(directory)
    assert make_runner(directory, torch.bfloat16)._weights.fused is not None
    with ranks(directory, (1,)) as exact, ranks(directory, (1,), dtype=torch.bfloat16) as whole:
        expected, rounded = exact.log_probs(TOKEN_IDS, RUNS), whole.log_probs(TOKEN_IDS, RUNS)
    with ranks(directory, (3, 1), dtype=torch.bfloat16, split="sequence" if split == "sequence" else "tensor") as cut_:
        assert all(cut_.runner(rank)._weights.fused is not None for rank in range(2))
        found = cut_.log_probs(TOKEN_IDS, RUNS)
    assert (rounded - expected).norm() < 0.05 * expected.norm()
    assert (found - expected).norm() < 1.5 * (rounded - expected).norm()


def test_a_ladder_is_not_cut_into_stages(path: Path) -> None:
    layout = ReplicaLayout(stages=(StageLayout(devices=(0,), weights=(1,)),) * 2)
    with pytest.raises(InvalidConfig, match="ladder-residual"):
        cut(read_model(path), layout, field="test")


def test_a_ladder_of_a_family_that_norms_its_updates_is_refused(checkpoint: Callable[..., Path]) -> None:
    config = json.loads((checkpoint("gemma3_text", head_dim=32) / "config.json").read_text())
    with pytest.raises(InvalidModel, match="ladder_residual"):
        read_model_spec(config | {"ladder_residual": True})
