"""Checkpoints of awkward shapes, what transformers says about them, and greedy decoding by single steps of a runner."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.steps import Steps, greedy_sampler, run
from workers.step.types import SequenceInput

NUM_OUTPUTS = 64
NUM_SLOTS = 4096
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
# Large enough for layers that run as one program.
WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "head_dim": 32,
}
Runs = tuple[tuple[int, int], ...]


@torch.inference_mode()
def greedy(oracle: PreTrainedModel, prompt: Sequence[int], num_outputs: int = NUM_OUTPUTS) -> list[int]:
    """Transformers' own greedy continuation; end-of-sequence ids do not end it."""
    outputs: list[int] = []
    result = oracle(torch.tensor([prompt]), use_cache=True)
    while True:
        outputs.append(int(result.logits[0, -1].argmax()))
        if len(outputs) == num_outputs:
            return outputs
        result = oracle(torch.tensor([outputs[-1:]]), past_key_values=result.past_key_values, use_cache=True)


@torch.inference_mode()
def greedy_without_cache(oracle: PreTrainedModel, prompt: Sequence[int], num_outputs: int = NUM_OUTPUTS) -> list[int]:
    """Continues one prompt by the plainest loop there is: all tokens are computed anew for each, with no padding."""
    token_ids = list(prompt)
    for _ in range(num_outputs):
        token_ids.append(int(oracle(torch.tensor([token_ids]), use_cache=False).logits[0, -1].argmax()))
    return token_ids[len(prompt) :]


@torch.inference_mode()
def greedy_each(
    oracle: PreTrainedModel, prompts: Sequence[Sequence[int]], num_outputs: int = NUM_OUTPUTS
) -> list[list[int]]:
    """Continues each prompt as :func:`greedy_without_cache` does, in a tenth of the steps.

    All continue together, padded on the left, with a cache. tests/workers/model/test_oracle.py compares the two.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    outputs: list[Tensor] = []
    past = None
    while len(outputs) < num_outputs:
        result = oracle(ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
        past, ids = result.past_key_values, result.logits[:, -1].argmax(dim=-1, keepdim=True)
        outputs.append(ids)
        mask, positions = torch.cat((mask, torch.ones_like(ids)), dim=1), positions[:, -1:] + 1
    found: list[list[int]] = torch.cat(outputs, dim=1).tolist()
    return found


@torch.inference_mode()
def oracle_logits(oracle: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    return oracle(torch.tensor([token_ids])).logits[0]


class Slots:
    """Hands out slots as a fragmented pool would: short runs of whole blocks in random order, none twice."""

    def __init__(self, seed: int = 0, num_slots: int = NUM_SLOTS, block_size: int = 1) -> None:
        rng = random.Random(seed)
        edges = [0]
        while edges[-1] < num_slots:
            edges.append(min(num_slots, edges[-1] + block_size * rng.randint(1, max(2, 24 // block_size))))
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


def continue_greedily(
    runner: Steps,
    prompts: Sequence[Sequence[int]],
    chunk_size: int,
    num_outputs: int = NUM_OUTPUTS,
    block_size: int = 1,
) -> list[list[int]]:
    """Prefills every prompt in chunks and decodes; all sequences share each step, whatever their phase."""
    slots = Slots(block_size=block_size)
    runs = [slots.take(len(prompt) + num_outputs) for prompt in prompts]
    token_ids = [list(prompt) for prompt in prompts]
    done = [0] * len(prompts)
    while True:
        active = [i for i, prompt in enumerate(prompts) if len(token_ids[i]) < len(prompt) + num_outputs]
        if not active:
            return [ids[len(prompt) :] for ids, prompt in zip(token_ids, prompts, strict=True)]
        stops = [min(len(token_ids[i]), done[i] + chunk_size) for i in active]
        batch = [chunk(token_ids[i], done[i], stop, runs[i]) for i, stop in zip(active, stops, strict=True)]
        for i, stop, sampled in zip(active, stops, run(runner, batch), strict=True):
            done[i] = stop
            if sampled is not None:
                token_ids[i].append(sampled.token_id)
