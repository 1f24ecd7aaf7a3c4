"""A runner whose operations are Triton's: on the GPU, or on the CPU under Triton's interpreter."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.cuda.variant import open_kernels
from placement.model.weights import whole_model
from tests.support.triton.triton_cases import DEVICE, HAS_GPU
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.startup.checkpoint import load_weights
from workers.startup.checks import read_model
from workers.step.graphs import StepInputs
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput


def triton_runner(directory: Path, dtype: torch.dtype = torch.float32, num_slots: int = 4096) -> ModelRunner:
    """A runner with empty slots."""
    device = open_device("cuda:0" if HAS_GPU else "cpu", 1)
    model = read_model(directory)
    return ModelRunner(
        model=model,
        weights=load_weights(directory, whole_model(model), dtype, device.torch_device, lambda *_: None),
        cache=allocate_kv_cache(model, num_slots=num_slots, dtype=dtype, device=device),
        device=device.torch_device,
        kernels=open_kernels(DEVICE),
    )


def lay_out(runner: ModelRunner, sequences: Sequence[SequenceInput]) -> StepInputs:
    """A step as the runner computes it."""
    return runner.lay_out(Batch(sequences=tuple(sequences))).inputs


def hidden(runner: ModelRunner, inputs: StepInputs) -> Tensor:
    """The last layer's output [T, E] of that step."""
    return runner._hidden(inputs)


def compute(runner: ModelRunner, inputs: StepInputs) -> Tensor:
    """The logits [T, V] of every row of that step."""
    return runner._all_logits(inputs)
