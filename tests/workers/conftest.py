"""A worker's parts put together for tests: a runner over a checkpoint, with slots handed out by the test."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from kernels.protocol import Kernels
from kernels.select import kernels_for
from placement.model.hf import read_model_spec
from placement.model.weights import whole_model
from tests.support.grammars import GatedFactory
from workers.host.device import open_device
from workers.model.kv_cache import allocate_kv_cache
from workers.sampling.grammar_compiler import GrammarCompiler
from workers.startup.checkpoint import load_weights
from workers.step.runner import ModelRunner

NUM_SLOTS = 4096


@pytest.fixture(scope="session")
def make_runner() -> Callable[..., ModelRunner]:
    """``make(directory, dtype=torch.float32, kernels=None)``: a runner with 4096 empty slots."""

    def make(directory: Path, dtype: torch.dtype = torch.float32, kernels: Kernels | None = None) -> ModelRunner:
        device = open_device("cpu", 1)
        model = read_model_spec(json.loads((directory / "config.json").read_text()))
        return ModelRunner(
            model=model,
            weights=load_weights(directory, whole_model(model), dtype, device.torch_device, lambda loaded, total: None),
            cache=allocate_kv_cache(model, num_slots=NUM_SLOTS, dtype=dtype, device=device),
            device=device.torch_device,
            kernels=kernels or kernels_for("cpu"),
        )

    return make


@pytest.fixture
async def factory() -> AsyncIterator[GatedFactory]:
    """Compiles grammars once its gate is open, as it is at the end."""
    factory = GatedFactory()
    yield factory
    factory.gate.set()


@pytest.fixture
async def grammars(factory: GatedFactory) -> AsyncIterator[GrammarCompiler]:
    compiler = GrammarCompiler(factory, num_threads=4)
    yield compiler
    compiler.close()
