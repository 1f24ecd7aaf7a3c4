"""Decoders on a GPU against transformers on the CPU: every family, chunks, decodes, and decodes by CUDA graphs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.select import kernels_for
from tests.support.oracle import (
    CHECKPOINTS,
    Slots,
    chunk,
    continue_greedily,
    greedy,
    oracle_logits,
)
from tests.support.steps import logits
from tests.support.triton.triton_cases import DEVICE, HAS_GPU
from workers.step.graphs import CudaCapture

if not HAS_GPU:
    pytest.skip("torch sees no CUDA device here", allow_module_level=True)

from tests.support.triton.triton_runner import triton_runner

pytestmark = pytest.mark.gpu
LENGTHS = (1, 2, 17, 50, 97)


def test_a_gpu_runs_triton() -> None:
    assert type(kernels_for(DEVICE)).__name__ == "CudaKernels"


@pytest.mark.parametrize("by_graphs", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    checkpoint: Callable[..., Path], name: str, by_graphs: bool
) -> None:
    family, config = CHECKPOINTS[name]
    path = checkpoint(family, **config)
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    runner = triton_runner(path)
    prompts = [[(7 * i + length) % 509 for i in range(length)] for length in LENGTHS]
    runs = Slots().take(97)
    rows = [
        logits(runner, [chunk(prompts[-1], start, start + 1 if start else 61, runs)]) for start in (0, *range(61, 97))
    ]
    torch.testing.assert_close(torch.cat(rows).cpu(), oracle_logits(oracle, prompts[-1]), atol=1e-4, rtol=1e-4)
    expected = [greedy(oracle, prompt) for prompt in prompts]
    if by_graphs:
        runner.capture_decodes(CudaCapture(DEVICE), max_decodes=len(prompts), max_tokens=2000)
    assert continue_greedily(runner, prompts, 1000) == expected
    assert continue_greedily(runner, prompts, 7) == expected
