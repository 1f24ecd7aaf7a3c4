"""Decoders on a GPU against transformers on the CPU: every family, chunks, decodes, and decodes by CUDA graph."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.select import kernels_for
from tests.support.steps import logits
from tests.support.triton_cases import DEVICE, HAS_GPU
from tests.workers.test_oracle import (
    CHECKPOINTS,
    NUM_OUTPUTS,
    Slots,
    chunk,
    continue_greedily,
    greedy,
    oracle_logits,
)
from workers.decoder import TokenBatch
from workers.graphs import CudaCapture, DecodeGraphs, StepMemory

if not HAS_GPU:
    pytest.skip("torch sees no CUDA device here", allow_module_level=True)

from tests.support.triton_runner import compute, lay_out, triton_runner

pytestmark = pytest.mark.gpu
LENGTHS = (1, 2, 17, 50, 97)


def test_a_gpu_runs_triton() -> None:
    assert type(kernels_for(DEVICE)).__name__ == "CudaKernels"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(checkpoint: Callable[..., Path], name: str) -> None:
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
    assert continue_greedily(runner, prompts, 1000) == expected
    assert continue_greedily(runner, prompts, 7) == expected


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_graphs_compute_what_the_decoder_does_while_sequences_end(
    checkpoint: Callable[..., Path], dtype: torch.dtype, tolerance: float
) -> None:
    runner = triton_runner(checkpoint("llama", **CHECKPOINTS["odd_heads_deep"][1]), dtype)
    slots = Slots()
    runs = [slots.take(length + NUM_OUTPUTS) for length in LENGTHS]
    token_ids = [[(7 * i + length) % 509 for i in range(length)] for length in LENGTHS]

    def step(active: list[int], *, whole: bool) -> TokenBatch:
        starts = {i: 0 if whole else len(token_ids[i]) - 1 for i in active}
        return lay_out(runner, [chunk(token_ids[i], starts[i], len(token_ids[i]), runs[i]) for i in active])

    eager = partial(compute, runner)
    active = list(range(len(LENGTHS)))
    like = step(active[:1], whole=False)
    inputs = StepMemory(like=like, max_decodes=8, max_tokens=2000)
    graphs = DecodeGraphs(compute=eager, inputs=inputs, capture=CudaCapture(DEVICE), sizes=(1, 2, 4, 8))
    eager(step(active, whole=True))
    while active:
        tokens = step(active, whole=False)
        expected, found = eager(tokens).logits, graphs(tokens).logits
        assert expected is not None and found is not None
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, atol=tolerance * scale, rtol=0)
        for i, token in zip(active, expected.argmax(dim=-1).tolist(), strict=True):
            token_ids[i].append(token)
        active = [i for i in active if len(token_ids[i]) < LENGTHS[i] + 4 * (i + 1)]
