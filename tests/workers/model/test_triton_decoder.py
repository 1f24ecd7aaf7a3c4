"""Compares whole decoders of Triton's operations with transformers, on checkpoints of every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.oracle import CHECKPOINTS, Slots, chunk, oracle_logits
from tests.support.steps import logits
from tests.support.triton.triton_cases import REASON, RUNS_HERE

if not RUNS_HERE:
    pytest.skip(REASON, allow_module_level=True)

from tests.support.triton.triton_runner import triton_runner

PROMPT = [7 * i % 509 for i in range(33)]


@pytest.mark.parametrize("name", ["biased_one_kv_head", "mistral", "qwen3", "gemma3"])
def test_logits_of_chunks_and_decodes_match(checkpoint: Callable[..., Path], name: str) -> None:
    family, config = CHECKPOINTS[name]
    path = checkpoint(family, **config)
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    runner = triton_runner(path)
    slots = Slots()
    runs, neighbours = slots.take(len(PROMPT)), slots.take(len(PROMPT))
    found = []
    for start, stop in ((0, 20), (20, 31), (31, 32), (32, 33)):  # decodes last, beside another sequence's chunks
        batch = [chunk(PROMPT, start, stop, runs), chunk(PROMPT[::-1], start, stop, neighbours)]
        found.append(logits(runner, batch)[: stop - start].cpu())
    torch.testing.assert_close(torch.cat(found), oracle_logits(oracle, PROMPT), atol=1e-4, rtol=1e-4)
