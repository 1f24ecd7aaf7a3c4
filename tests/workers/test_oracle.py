"""The runner against transformers, on checkpoints of awkward shapes: same logits, same greedy tokens."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.steps import greedy_sampler, logits, run
from workers.runner import ModelRunner, SequenceInput

NUM_OUTPUTS = 64
NUM_SLOTS = 4096
DEMO = Path(__file__).parents[2] / "deploy" / "demo"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
ODD_HEADS = {
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "hidden_size": 120,
    "num_hidden_layers": 7,
    "initializer_range": 0.1,
}
# Family and configuration. Windows are shorter than most prompts, and layers with and without one are mixed.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "odd_heads_deep": ("llama", ODD_HEADS),
    "tied_llama3_wide_heads": ("llama", {"tie_word_embeddings": True, "head_dim": 48, "rope_parameters": LLAMA3}),
    "biased_one_kv_head": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": 10},
    ),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": 24, "head_dim": 32}),
    "qwen2": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 20,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
            "rope_parameters": YARN,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24, "attention_bias": True, "rope_parameters": YARN | {"attention_factor": 1.3}}),
    "gemma": ("gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": 17,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": LINEAR | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
LENGTHS = (1, 2, 3, 16, 17, 31, 33, 50, 64, 65, 70, 81, 90, 97, 5, 8)
FEW_LENGTHS = (1, 16, 17, 33, 50, 65, 97)
WITH_ALL_LENGTHS = ("plain", "odd_heads_deep", "tied_llama3_wide_heads", "biased_one_kv_head", "demo")
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A checkpoint, and what transformers says about it. Prompts and greedy outputs are keyed by prompt length."""

    runner: ModelRunner
    oracle: PreTrainedModel
    prompts: dict[int, list[int]]
    outputs: dict[int, list[int]]  # NUM_OUTPUTS each


@pytest.fixture(scope="module", params=[*CHECKPOINTS, "demo"])
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
        outputs={length: greedy(oracle, prompt) for length, prompt in prompts.items()},
    )


@torch.inference_mode()
def greedy(oracle: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """Transformers' own greedy continuation; end-of-sequence ids do not end it."""
    outputs: list[int] = []
    result = oracle(torch.tensor([prompt]), use_cache=True)
    while True:
        outputs.append(int(result.logits[0, -1].argmax()))
        if len(outputs) == NUM_OUTPUTS:
            return outputs
        result = oracle(torch.tensor([outputs[-1:]]), past_key_values=result.past_key_values, use_cache=True)


@torch.inference_mode()
def oracle_logits(oracle: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    return oracle(torch.tensor([token_ids])).logits[0]


class Slots:
    """Hands out slots as a fragmented pool would: short runs in random order, none twice."""

    def __init__(self, seed: int = 0, num_slots: int = NUM_SLOTS) -> None:
        rng = random.Random(seed)
        edges = [0]
        while edges[-1] < num_slots:
            edges.append(min(num_slots, edges[-1] + rng.randint(1, 24)))
        self._free = list(itertools.pairwise(edges))
        rng.shuffle(self._free)

    def take(self, num_tokens: int) -> Runs:
        runs = []
        while num_tokens:
            start, stop = self._free.pop()
            used = min(stop, start + num_tokens)
            runs.append((start, used))
            num_tokens -= used - start
        return tuple(runs)


def first(runs: Runs, num_tokens: int) -> Runs:
    """The runs of the first ``num_tokens`` tokens, written apart from the code under test."""
    slots = [slot for start, stop in runs for slot in range(start, stop)][:num_tokens]
    cut: list[tuple[int, int]] = []
    for slot in slots:
        if cut and cut[-1][1] == slot:
            cut[-1] = (cut[-1][0], slot + 1)
        else:
            cut.append((slot, slot + 1))
    return tuple(cut)


def chunk(token_ids: Sequence[int], start: int, stop: int, runs: Runs) -> SequenceInput:
    return SequenceInput(
        token_ids=token_ids[start:stop],
        start=start,
        runs=first(runs, stop),
        sampler=greedy_sampler(),
        samples=stop == len(token_ids),
    )


def continue_greedily(runner: ModelRunner, prompts: Sequence[Sequence[int]], chunk_size: int) -> list[list[int]]:
    """Prefills every prompt in chunks and decodes; all sequences share each step, whatever their phase."""
    slots = Slots()
    runs = [slots.take(len(prompt) + NUM_OUTPUTS) for prompt in prompts]
    token_ids = [list(prompt) for prompt in prompts]
    done = [0] * len(prompts)
    while True:
        active = [i for i, prompt in enumerate(prompts) if len(token_ids[i]) < len(prompt) + NUM_OUTPUTS]
        if not active:
            return [ids[len(prompt) :] for ids, prompt in zip(token_ids, prompts, strict=True)]
        stops = [min(len(token_ids[i]), done[i] + chunk_size) for i in active]
        batch = [chunk(token_ids[i], done[i], stop, runs[i]) for i, stop in zip(active, stops, strict=True)]
        for i, stop, sampled in zip(active, stops, run(runner, batch), strict=True):
            done[i] = stop
            if sampled is not None:
                token_ids[i].append(sampled.token_id)


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
    """Its KV is lost; prompt and outputs so far are prefilled again, into other slots, beside a neighbour."""
    prompt, outputs = case.prompts[65], case.outputs[65]
    resumed = prompt + outputs[:29]
    expected = [outputs[29:], case.outputs[16]]
    continued = continue_greedily(case.runner, [resumed, case.prompts[16]], 40)
    assert [continued[0][: len(expected[0])], continued[1]] == expected


@pytest.mark.parametrize("name", ["odd_heads_deep", "qwen3", "gemma3"])
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
