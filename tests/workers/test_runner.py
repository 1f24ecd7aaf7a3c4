"""What the runner does with a batch, beyond the numbers that the oracle tests check."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.select import kernels_for
from placement.hf import read_model_spec
from placement.weights import whole_model
from workers.decoder import assemble
from workers.device import open_device
from workers.runner import ModelRunner, SequenceInput
from workers.sampling import SamplingParams
from workers.weights import load_weights

GREEDY = SamplingParams()
PROMPT = [5, 17, 300, 42, 8, 99, 1, 260]


@pytest.fixture(scope="module")
def path(llama_checkpoint: Callable[..., Path]) -> Path:
    return llama_checkpoint(hidden_size=60, num_attention_heads=6, num_key_value_heads=3, head_dim=16)


@pytest.fixture(scope="module")
def runner(path: Path, make_runner: Callable[..., ModelRunner]) -> ModelRunner:
    return make_runner(path)


def test_sequences_that_want_no_token_get_none(runner: ModelRunner) -> None:
    batch = [
        SequenceInput(token_ids=PROMPT, start=0, runs=((0, 8),)),
        SequenceInput(token_ids=PROMPT, start=0, runs=((8, 16),), params=GREEDY),
    ]
    unfinished, finished = runner.run(batch)
    assert unfinished is None
    assert finished is not None
    assert runner.run(batch[:1]) == [None]


def test_a_sampled_continuation_is_the_same_alone_and_in_a_batch(runner: ModelRunner) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.0, top_p=0.9, seed=seed)

    def continuations(seeds: list[int]) -> dict[int, list[int]]:
        token_ids = {seed: list(PROMPT) for seed in seeds}
        for index in range(12):
            start = 0 if index == 0 else len(PROMPT) + index - 1
            batch = [
                SequenceInput(
                    token_ids=token_ids[seed][start:],
                    start=start,
                    runs=((100 * place, 100 * place + len(token_ids[seed])),),
                    params=params(seed),
                    output_index=index,
                )
                for place, seed in enumerate(seeds)
            ]
            for seed, token in zip(seeds, runner.run(batch), strict=True):
                assert token is not None
                token_ids[seed].append(token.token_id)
        return {seed: ids[len(PROMPT) :] for seed, ids in token_ids.items()}

    together = continuations([1, 2, 3, 4])
    assert len({tuple(ids) for ids in together.values()}) == 4
    assert continuations([3]) == {3: together[3]}


def test_a_step_touches_no_slots_but_its_own(path: Path, make_runner: Callable[..., ModelRunner]) -> None:
    runner = make_runner(path)
    runner.run([SequenceInput(token_ids=PROMPT, start=0, runs=((10, 13), (30, 35)), params=GREEDY)])
    written = {10, 11, 12, 30, 31, 32, 33, 34}
    for layer in runner._cache.layers:
        for tensor in (layer.keys, layer.values):
            assert set(tensor.abs().sum(dim=(0, 2)).nonzero().flatten().tolist()) == written


def test_reference_kernels_give_the_same_logits(path: Path, make_runner: Callable[..., ModelRunner]) -> None:
    """What a device without kernels of its own runs."""
    rows = []
    for kernels in (None, reference):
        runner = make_runner(path, kernels=kernels)
        runner.logits([SequenceInput(token_ids=PROMPT[:5], start=0, runs=((3, 8),))])
        rest = SequenceInput(token_ids=PROMPT[5:], start=5, runs=((3, 8), (20, 23)), params=GREEDY)
        rows.append(runner.logits([rest]))
    torch.testing.assert_close(rows[0], rows[1], atol=1e-5, rtol=1e-5)


def test_assembling_empties_the_given_weights(path: Path) -> None:
    model = read_model_spec(json.loads((path / "config.json").read_text()))
    device = open_device("cpu", 1).torch_device
    tensors = load_weights(path, whole_model(model), torch.float32, device, lambda loaded, total: None)
    names = ("q_proj", "k_proj", "v_proj")
    expected = torch.cat([tensors[f"model.layers.1.self_attn.{name}.weight"] for name in names])
    weights = assemble(tensors, kernels_for("cpu"))
    assert tensors == {}
    x = torch.randn(3, model.hidden_size)
    torch.testing.assert_close(weights.layers[1].qkv(x), x @ expected.T)


def test_a_tied_head_is_the_embedding(llama_checkpoint: Callable[..., Path]) -> None:
    path = llama_checkpoint(tie_word_embeddings=True)
    model = read_model_spec(json.loads((path / "config.json").read_text()))
    device = open_device("cpu", 1).torch_device
    tensors = load_weights(path, whole_model(model), torch.float32, device, lambda loaded, total: None)
    weights = assemble(tensors, kernels_for("cpu"))
    x = torch.randn(3, model.hidden_size)
    torch.testing.assert_close(weights.head(x), x @ weights.embedding.T)
