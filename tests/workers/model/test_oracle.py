"""Compares the runner with transformers on checkpoints of awkward shapes: logits and greedy tokens are the same."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from placement.model.specs import Architecture
from tests.support.oracle import (
    CHECKPOINTS,
    Slots,
    chunk,
    continue_greedily,
    greedy_each,
    greedy_without_cache,
    oracle_logits,
)
from tests.support.steps import logits
from workers.step.runner import ModelRunner
from workers.step.types import SequenceInput

DEMO = Path(__file__).parents[3] / "deploy" / "demo"
LENGTHS = (1, 2, 3, 16, 17, 31, 33, 50, 64, 65, 70, 81, 90, 97, 5, 8)
FEW_LENGTHS = (1, 16, 17, 33, 50, 65, 97)
ALONE_LENGTHS = (1, 17, 65, 97)  # with and without padding, shorter and longer than all windows
WITH_ALL_LENGTHS = ("plain", "odd_heads_deep", "tied_llama3_wide_heads", "biased_one_kv_head", "demo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A checkpoint, and what transformers computes with it. Prompts and greedy outputs are keyed by prompt length."""

    runner: ModelRunner
    oracle: PreTrainedModel
    prompts: dict[int, list[int]]
    outputs: dict[int, list[int]]  # NUM_OUTPUTS each


# A checkpoint whose heads have compiled attention on every target, and that is computed on every one, too.
ON_EVERY_TARGET = "gemma"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.every_target) if name == ON_EVERY_TARGET else name
        for name in (*CHECKPOINTS, "demo")
    ],
)
def case(request: pytest.FixtureRequest, checkpoint: Callable[..., Path], make_runner: Any) -> Case:
    if request.param == "demo":
        if not (DEMO / "model.safetensors").exists():
            pytest.skip("deploy/demo/model.safetensors has not been made")
        path = DEMO
    else:
        family, config = CHECKPOINTS[request.param]
        path = checkpoint(family, **config)
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rng = random.Random(0)
    lengths = LENGTHS if request.param in WITH_ALL_LENGTHS else FEW_LENGTHS
    prompts = {length: [rng.randrange(oracle.config.vocab_size) for _ in range(length)] for length in lengths}
    return Case(
        runner=make_runner(path),
        oracle=oracle,
        prompts=prompts,
        outputs=dict(zip(prompts, greedy_each(oracle, [*prompts.values()]), strict=True)),
    )


def test_prompts_together_are_continued_by_transformers_as_each_alone_without_a_cache(case: Case) -> None:
    """Checks the oracle itself: neither padding, nor its cache, nor the other prompts change a token."""
    for length in ALONE_LENGTHS:
        assert case.outputs[length] == greedy_without_cache(case.oracle, case.prompts[length]), length


def test_the_oracle_is_checked_for_every_family_that_is_served() -> None:
    assert {family for family, _ in CHECKPOINTS.values()} == set(get_args(Architecture))


def test_logits_of_every_position_match(case: Case) -> None:
    token_ids = case.prompts[97] + case.outputs[97]
    whole = SequenceInput(token_ids=token_ids, start=0, runs=((7, 7 + len(token_ids)),))
    found = logits(case.runner, [whole])
    torch.testing.assert_close(found, oracle_logits(case.oracle, token_ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 61])
def test_logits_of_a_chunked_prompt_match(case: Case, chunk_size: int) -> None:
    prompt = case.prompts[97]
    runs = Slots(seed=chunk_size).take(len(prompt))
    rows = [
        logits(
            case.runner,
            [chunk(prompt, start, min(len(prompt), start + chunk_size), runs)],
        )
        for start in range(0, len(prompt), chunk_size)
    ]
    torch.testing.assert_close(torch.cat(rows), oracle_logits(case.oracle, prompt), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 65])
def test_a_sequence_alone_gets_the_same_tokens(case: Case, length: int) -> None:
    assert continue_greedily(case.runner, [case.prompts[length]], 1000) == [case.outputs[length]]


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_mixed_sequences_get_the_same_tokens(case: Case, chunk_size: int) -> None:
    assert continue_greedily(case.runner, [*case.prompts.values()], chunk_size) == [*case.outputs.values()]


def test_a_preempted_sequence_continues_with_the_same_tokens(case: Case) -> None:
    """Its KV is lost. Prompt and outputs so far are prefilled again, into other slots, beside another sequence."""
    prompt, outputs = case.prompts[65], case.outputs[65]
    resumed = prompt + outputs[:29]
    expected = [outputs[29:], case.outputs[16]]
    continued = continue_greedily(case.runner, [resumed, case.prompts[16]], 40)
    assert [continued[0][: len(expected[0])], continued[1]] == expected


@pytest.mark.parametrize("name", ["odd_heads_deep", "qwen3", pytest.param("gemma3", marks=pytest.mark.every_target)])
def test_bfloat16_stays_near_float32(
    checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner], name: str
) -> None:
    family, config = CHECKPOINTS[name]
    path = checkpoint(family, **config, dtype="bfloat16")
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    prompt = [7 * i % 509 for i in range(80)]
    runs = Slots().take(len(prompt))
    runner = make_runner(path, torch.bfloat16)
    chunks = [chunk(prompt, start, start + 16, runs) for start in range(0, 80, 16)]
    found = torch.cat([logits(runner, [part]) for part in chunks]).float()
    expected = oracle_logits(exact, prompt)
    error, peer_error = (
        (found - expected).abs().mean(),
        (oracle_logits(peer, prompt) - expected).abs().mean(),
    )
    assert found.shape == (80, 509)
    assert error < 1.2 * peer_error
