"""Checks what the runner does with a batch, beyond the numbers that the oracle tests check."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from kernels import reference
from kernels.select import kernels_for
from placement.model.hf import read_model_spec
from placement.model.part import Part
from placement.model.weights import whole_model
from tests.support.steps import greedy_sampler, logits, run
from workers.host.device import open_device
from workers.model.decoder_weights import assemble
from workers.sampling.sampling import SamplerState, SamplingParams
from workers.startup.checkpoint import load_weights
from workers.step.runner import ModelRunner
from workers.step.scoring import ScoredPrompt, score
from workers.step.types import Batch, SequenceInput

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
        SequenceInput(token_ids=PROMPT, start=0, runs=((8, 16),), sampler=greedy_sampler(), samples=True),
    ]
    unfinished, finished = run(runner, batch)
    assert unfinished is None
    assert finished is not None
    assert run(runner, batch[:1]) == [None]


def test_a_sampled_continuation_is_the_same_alone_and_in_a_batch(runner: ModelRunner) -> None:
    def continuations(seeds: list[int]) -> dict[int, list[int]]:
        token_ids = {seed: list(PROMPT) for seed in seeds}
        samplers = {seed: SamplerState(SamplingParams(temperature=1.0, top_p=0.9, seed=seed), PROMPT) for seed in seeds}
        for index in range(12):
            start = 0 if index == 0 else len(PROMPT) + index - 1
            batch = [
                SequenceInput(
                    token_ids=token_ids[seed][start:],
                    start=start,
                    runs=((100 * place, 100 * place + len(token_ids[seed])),),
                    sampler=samplers[seed],
                    samples=True,
                )
                for place, seed in enumerate(seeds)
            ]
            for seed, token in zip(seeds, run(runner, batch), strict=True):
                assert token is not None
                token_ids[seed].append(token.token_id)
        return {seed: ids[len(PROMPT) :] for seed, ids in token_ids.items()}

    together = continuations([1, 2, 3, 4])
    assert len({tuple(ids) for ids in together.values()}) == 4
    assert continuations([3]) == {3: together[3]}


def test_a_step_touches_no_slots_but_its_own(path: Path, make_runner: Callable[..., ModelRunner]) -> None:
    runner = make_runner(path)
    run(
        runner,
        [SequenceInput(token_ids=PROMPT, start=0, runs=((10, 13), (30, 35)), sampler=greedy_sampler(), samples=True)],
    )
    written = {10, 11, 12, 30, 31, 32, 33, 34}
    for layer in runner._cache.layers:
        for tensor in (layer.keys, layer.values):
            assert set(tensor.abs().sum(dim=(0, 2)).nonzero().flatten().tolist()) == written


def test_reference_kernels_give_the_same_logits(path: Path, make_runner: Callable[..., ModelRunner]) -> None:
    """A device without kernels of its own runs these."""
    rows = []
    for kernels in (None, reference):
        runner = make_runner(path, kernels=kernels)
        logits(runner, [SequenceInput(token_ids=PROMPT[:5], start=0, runs=((3, 8),))])
        rest = SequenceInput(
            token_ids=PROMPT[5:], start=5, runs=((3, 8), (20, 23)), sampler=greedy_sampler(), samples=True
        )
        rows.append(logits(runner, [rest]))
    torch.testing.assert_close(rows[0], rows[1], atol=1e-5, rtol=1e-5)


def test_assembling_empties_the_given_weights(path: Path) -> None:
    model = read_model_spec(json.loads((path / "config.json").read_text()))
    device = open_device("cpu", 1).torch_device
    tensors = load_weights(path, whole_model(model), torch.float32, device, lambda loaded, total: None)
    names = ("q_proj", "k_proj", "v_proj")
    expected = torch.cat([tensors[f"model.layers.1.self_attn.{name}.weight"] for name in names])
    weights = assemble(model, Part.whole(model), tensors, kernels_for("cpu"))
    assert tensors == {}
    x = torch.randn(3, model.hidden_size)
    torch.testing.assert_close(weights.layers[1].qkv(x), x @ expected.T)


def test_a_tied_head_is_the_embedding(llama_checkpoint: Callable[..., Path]) -> None:
    path = llama_checkpoint(tie_word_embeddings=True)
    model = read_model_spec(json.loads((path / "config.json").read_text()))
    device = open_device("cpu", 1).torch_device
    tensors = load_weights(path, whole_model(model), torch.float32, device, lambda loaded, total: None)
    weights = assemble(model, Part.whole(model), tensors, kernels_for("cpu"))
    x = torch.randn(3, model.hidden_size)
    ends = weights.ends
    assert ends is not None and ends.head is not None
    torch.testing.assert_close(ends.head(x), x @ ends.embedding.T)


def test_a_token_that_is_awaited_is_put_in_when_the_step_begins(runner: ModelRunner) -> None:
    """Two steps are prepared before the first executes, and give the tokens of one step after the other."""
    one = greedy_sampler()
    first = SequenceInput(token_ids=PROMPT, start=0, runs=((0, 8),), sampler=one, samples=True)
    (token,) = run(runner, [first])
    assert token is not None
    second = SequenceInput(token_ids=[token.token_id], start=8, runs=((0, 9),), sampler=one, samples=True)
    expected = [token, *run(runner, [second])]
    other = greedy_sampler()
    ahead = [
        runner.prepare(
            Batch(
                sequences=(
                    SequenceInput(
                        token_ids=ids, start=start, runs=((0, stop),), awaits_token=not ids, sampler=other, samples=True
                    ),
                )
            )
        )
        for ids, start, stop in ((PROMPT, 0, 8), ([], 8, 9))
    ]
    assert [step().tokens[0] for step in ahead] == expected


def test_prompt_tokens_are_scored_as_transformers_would(path: Path, runner: ModelRunner) -> None:
    oracle = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = oracle(torch.tensor([PROMPT])).logits[0].log_softmax(dim=-1)
    found: list[float] = []
    for start, stop in ((0, 3), (3, 8)):
        targets = PROMPT[start + 1 : stop + 1]
        scored = ScoredPrompt(first_index=start + 1, token_ids=targets, num_top=3)
        chunk = SequenceInput(token_ids=PROMPT[start:stop], start=start, runs=((40, 40 + stop),), scored=scored)
        scores = runner.prepare(Batch(sequences=(chunk,)))().scores[0]
        assert scores.first_index == start + 1
        found += scores.logprobs
        for position, top in enumerate(scores.top, start):
            best = expected[position].topk(3)
            assert [token_id for token_id, _ in top] == best.indices.tolist()
            assert [logprob for _, logprob in top] == pytest.approx(best.values.tolist(), abs=1e-4)
    wanted = [float(expected[i, token_id]) for i, token_id in enumerate(PROMPT[1:])]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_long_prompts_are_scored_in_parts() -> None:
    hidden, head = torch.randn(300, 8), torch.randn(50, 8)
    prompt = ScoredPrompt(first_index=1, token_ids=[i % 50 for i in range(300)], num_top=0)
    rows: list[int] = []

    def project(part: torch.Tensor) -> torch.Tensor:
        rows.append(len(part))
        return part @ head.T

    scores = score(hidden, project, prompt)
    expected = (hidden @ head.T).log_softmax(dim=-1)[torch.arange(300), torch.arange(300) % 50]
    assert scores.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(scores.top) == 300 and not any(scores.top)
    assert max(rows) <= 32 and sum(rows) == 300
