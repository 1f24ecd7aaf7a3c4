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
from transformers import LlamaForCausalLM

from workers.runner import ModelRunner, SequenceInput
from workers.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
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
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd_heads_deep": {
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "hidden_size": 120,
        "num_hidden_layers": 7,
        "initializer_range": 0.1,
    },
    "tied_llama3_wide_heads": {"tie_word_embeddings": True, "head_dim": 48, "rope_parameters": LLAMA3},
    "biased_one_kv_head": {
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 1,
        "head_dim": 10,
    },
}
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A checkpoint, and what transformers says about it."""

    runner: ModelRunner
    oracle: LlamaForCausalLM
    prompts: list[list[int]]  # 16 of mixed lengths
    outputs: list[list[int]]  # greedy, NUM_OUTPUTS each


@pytest.fixture(scope="module", params=[*SHAPES, "demo"])
def case(request: pytest.FixtureRequest, llama_checkpoint: Callable[..., Path], make_runner: Any) -> Case:
    if request.param == "demo" and not (DEMO / "model.safetensors").exists():
        pytest.skip("deploy/demo/model.safetensors has not been made")
    path = DEMO if request.param == "demo" else llama_checkpoint(**SHAPES[request.param])
    oracle = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rng = random.Random(0)
    lengths = [1, 2, 3, 16, 17, 31, 33, 50, 64, 65, 70, 81, 90, 97, 5, 8]
    vocab_size = oracle.config.vocab_size
    prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
    return Case(
        runner=make_runner(path),
        oracle=oracle,
        prompts=prompts,
        outputs=[greedy(oracle, prompt) for prompt in prompts],
    )


@torch.inference_mode()
def greedy(oracle: LlamaForCausalLM, prompt: Sequence[int]) -> list[int]:
    """Transformers' own greedy continuation; end-of-sequence ids do not end it."""
    outputs: list[int] = []
    result = oracle(torch.tensor([prompt]), use_cache=True)
    while True:
        outputs.append(int(result.logits[0, -1].argmax()))
        if len(outputs) == NUM_OUTPUTS:
            return outputs
        result = oracle(torch.tensor([outputs[-1:]]), past_key_values=result.past_key_values, use_cache=True)


@torch.inference_mode()
def oracle_logits(oracle: LlamaForCausalLM, token_ids: Sequence[int]) -> Tensor:
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


def chunk(token_ids: Sequence[int], start: int, stop: int, runs: Runs, *, prompt_len: int) -> SequenceInput:
    return SequenceInput(
        token_ids=token_ids[start:stop],
        start=start,
        runs=first(runs, stop),
        params=GREEDY if stop == len(token_ids) else None,
        output_index=max(0, stop - prompt_len),
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
        batch = [
            chunk(token_ids[i], done[i], stop, runs[i], prompt_len=len(prompts[i]))
            for i, stop in zip(active, stops, strict=True)
        ]
        for i, stop, sampled in zip(active, stops, runner.run(batch), strict=True):
            done[i] = stop
            if sampled is not None:
                token_ids[i].append(sampled.token_id)


def test_logits_of_every_position_match(case: Case) -> None:
    token_ids = case.prompts[12] + case.outputs[12]
    whole = SequenceInput(token_ids=token_ids, start=0, runs=((7, 7 + len(token_ids)),), params=GREEDY)
    logits = case.runner.logits([whole], all_positions=True)
    torch.testing.assert_close(logits, oracle_logits(case.oracle, token_ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 61])
def test_logits_of_a_chunked_prompt_match(case: Case, chunk_size: int) -> None:
    prompt = case.prompts[13]
    runs = Slots(seed=chunk_size).take(len(prompt))
    rows = [
        case.runner.logits(
            [chunk(prompt, start, min(len(prompt), start + chunk_size), runs, prompt_len=len(prompt))],
            all_positions=True,
        )
        for start in range(0, len(prompt), chunk_size)
    ]
    torch.testing.assert_close(torch.cat(rows), oracle_logits(case.oracle, prompt), atol=1e-4, rtol=1e-4)


def test_only_the_last_token_of_asking_sequences_gets_logits(case: Case) -> None:
    slots = Slots()
    batch = [
        chunk(prompt, 0, stop, slots.take(len(prompt)), prompt_len=len(prompt))
        for prompt, stop in ((case.prompts[4], 17), (case.prompts[6], 20), (case.prompts[7], 50))
    ]
    logits = case.runner.logits(batch)
    expected = torch.stack([oracle_logits(case.oracle, case.prompts[i])[-1] for i in (4, 7)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("index", [0, 11])
def test_a_sequence_alone_gets_the_same_tokens(case: Case, index: int) -> None:
    assert continue_greedily(case.runner, [case.prompts[index]], 1000) == [case.outputs[index]]


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_sixteen_mixed_sequences_get_the_same_tokens(case: Case, chunk_size: int) -> None:
    assert continue_greedily(case.runner, case.prompts, chunk_size) == case.outputs


def test_a_preempted_sequence_continues_with_the_same_tokens(case: Case) -> None:
    """Its KV is lost; prompt and outputs so far are prefilled again, into other slots, beside a neighbour."""
    prompt, outputs = case.prompts[9], case.outputs[9]
    resumed = prompt + outputs[:29]
    expected = [outputs[29:], case.outputs[3]]
    continued = continue_greedily(case.runner, [resumed, case.prompts[3]], 40)
    assert [continued[0][: len(expected[0])], continued[1]] == expected


def test_bfloat16_stays_near_float32(
    llama_checkpoint: Callable[..., Path], make_runner: Callable[..., ModelRunner]
) -> None:
    path = llama_checkpoint(**SHAPES["odd_heads_deep"], dtype="bfloat16")
    exact = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    peer = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    prompt = [7 * i % 509 for i in range(80)]
    runs = Slots().take(len(prompt))
    runner = make_runner(path, torch.bfloat16)
    chunks = [chunk(prompt, start, start + 16, runs, prompt_len=80) for start in range(0, 80, 16)]
    logits = torch.cat([runner.logits([part], all_positions=True) for part in chunks]).float()
    expected = oracle_logits(exact, prompt)
    error, peer_error = (
        (logits - expected).abs().mean(),
        (oracle_logits(peer, prompt) - expected).abs().mean(),
    )
    assert logits.shape == (80, 509)
    assert error < 1.2 * peer_error
