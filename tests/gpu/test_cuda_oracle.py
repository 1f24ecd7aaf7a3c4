"""The CUDA path against the CPU's, where a GPU is at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.select import kernels_for
from placement.weights import whole_model
from workers.device import open_device
from workers.kv_cache import allocate_kv_cache
from workers.loading import read_model
from workers.runner import ModelRunner, SequenceInput
from workers.sampling import SamplingParams
from workers.weights import load_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


def make_runner(directory: Path, device_name: str) -> ModelRunner:
    device = open_device(device_name, 1)
    model = read_model(directory)
    return ModelRunner(
        model=model,
        weights=load_weights(directory, whole_model(model), torch.float32, device.torch_device, lambda *_: None),
        cache=allocate_kv_cache(model, num_slots=1024, dtype=torch.float32, device=device),
        device=device.torch_device,
        kernels=kernels_for(device.torch_device.type),
    )


def test_cuda_gives_the_logits_and_tokens_of_the_cpu(llama_checkpoint: Callable[..., Path]) -> None:
    directory = llama_checkpoint(num_hidden_layers=5, num_attention_heads=15, num_key_value_heads=5, hidden_size=120)
    prompt = list(range(3, 80))
    answers: dict[str, Any] = {}
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in ("cpu", "cuda:0"):
        runner = make_runner(directory, name)
        params = SamplingParams()
        chunk = SequenceInput(token_ids=prompt, start=0, runs=((0, len(prompt)),), params=params)
        logits = runner.logits([chunk]).float().cpu()
        (token,) = runner.run([chunk])
        tokens = []
        for position in range(len(prompt), len(prompt) + 64):
            assert token is not None
            tokens.append(token.token_id)
            step = SequenceInput(token_ids=tokens[-1:], start=position, runs=((0, position + 1),), params=params)
            (token,) = runner.run([step])
        answers[name] = (logits, tokens)
    assert (answers["cpu"][0] - answers["cuda:0"][0]).abs().max() < 1e-4
    assert answers["cpu"][1] == answers["cuda:0"][1]
