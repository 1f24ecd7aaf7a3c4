"""The bound of a decode step: all linear layers of the model, packed as the engine packs them, back to back.

Speaks as a peer does, in our own environment: what remains of a step's time is attention, sampling, and overhead.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peer_protocol import Measure, serve

from kernels.cpu.products.linear import pack
from kernels.linear import Linear
from placement.model.specs import ModelSpec
from tests.benchmarks.engine.engine_models import read_spec


def shapes(model: ModelSpec) -> Iterator[tuple[int, int]]:
    """(outputs, inputs) of every fused linear layer, in the order in which a step runs them."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    for _ in range(model.num_layers):
        yield queries + 2 * keys, model.hidden_size
        yield model.hidden_size, queries
        yield 2 * model.ffn_size, model.hidden_size
        yield model.hidden_size, model.ffn_size
    yield model.vocab_size, model.hidden_size


def load(settings: dict[str, Any]) -> tuple[Measure, dict[str, str]]:
    torch.set_num_threads(settings["threads"])
    # As a worker does, but without a claim: that would keep the worker beside it from its cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["threads"]])
    torch.manual_seed(0)
    layers: list[tuple[Linear, int]] = []
    for outputs, inputs in shapes(read_spec(Path(settings["model"]))):
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16).normal_(std=0.02)
        layers.append((pack(weight, None), inputs))

    @torch.inference_mode()
    def measure(case: dict[str, Any]) -> tuple[float, int]:
        rows = case["num_sequences"] * (case["num_tokens"] if case["phase"] == "prefill" else 1)
        inputs = {size: torch.randn(rows, size).to(torch.bfloat16) for _, size in layers}
        for layer, size in layers[:5]:
            layer(inputs[size])
        started = time.perf_counter()
        for _ in range(case["num_steps"]):
            for layer, size in layers:
                layer(inputs[size])
        return time.perf_counter() - started, rows * case["num_steps"]

    return measure, {}


if __name__ == "__main__":
    sys.exit(serve(load))
