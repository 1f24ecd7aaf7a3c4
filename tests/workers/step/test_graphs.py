"""Checks that decode graphs give what their decoder gives. Without a GPU they compute again each time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support.captures import run_again
from tests.support.oracle import CHECKPOINTS, Slots, chunk
from tests.support.triton.triton_cases import DEVICE, HAS_GPU, REASON, RUNS_HERE
from workers.step.graphs import CudaCapture, DecodeGraphs, StepMemory

if not RUNS_HERE:
    pytest.skip(REASON, allow_module_level=True)

from tests.support.triton.triton_runner import compute, lay_out, triton_runner

# Rows of no sequence hold anything; a GPU says nothing where the interpreter's numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
LENGTHS = (3, 300, 17)  # the second is cut into parts


@torch.inference_mode()
@pytest.mark.parametrize("name", ["plain", "gemma3"])
def test_a_replayed_step_gives_the_logits_and_writes_the_kv_of_the_decoder(
    checkpoint: Callable[..., Path], name: str
) -> None:
    family, config = CHECKPOINTS[name]
    runner = triton_runner(checkpoint(family, **config))
    slots = Slots()
    prompts = [[(11 * i + length) % 509 for i in range(length)] for length in LENGTHS]
    runs = [slots.take(length) for length in LENGTHS]
    compute_step = partial(compute, runner)
    decodes = lay_out(runner, [chunk(p, len(p) - 1, len(p), r) for p, r in zip(prompts, runs, strict=True)])
    for layer in runner._cache.layers:  # as if the tokens before had been computed
        layer.keys.normal_()
        layer.values.normal_()
    before = [(layer.keys.clone(), layer.values.clone()) for layer in runner._cache.layers]
    expected = compute_step(decodes)
    after = [(layer.keys.clone(), layer.values.clone()) for layer in runner._cache.layers]
    for layer, (keys, values) in zip(runner._cache.layers, before, strict=True):
        layer.keys.copy_(keys)
        layer.values.copy_(values)

    inputs = StepMemory(like=decodes, max_decodes=4, max_tokens=1000)
    capture = CudaCapture(DEVICE) if HAS_GPU else run_again
    graphs = DecodeGraphs(compute=compute_step, inputs=inputs, capture=capture, sizes=(1, 4))
    for layer, (keys, values) in zip(runner._cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)  # capturing writes nothing
    assert graphs.can_run(decodes)
    found = graphs(decodes)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for layer, (keys, values) in zip(runner._cache.layers, after, strict=True):
        torch.testing.assert_close(layer.keys, keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.values, values, atol=1e-5, rtol=1e-5)
