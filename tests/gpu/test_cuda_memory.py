"""What a GPU's memory is reckoned to take, and what it takes: sampling, and graphs of decodes."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from placement.model.specs import DType
from placement.planning.memory import SAMPLED_ON_GPU, graph_bytes, graphed_tokens, sampling_bytes
from tests.support.triton.triton_cases import DEVICE, HAS_GPU
from tests.workers.sampling.test_sampling_memory import WAYS, states
from workers.sampling.sampling import sample
from workers.startup.checks import read_model
from workers.step.graphs import CudaCapture

if not HAS_GPU:
    pytest.skip("torch sees no CUDA device here", allow_module_level=True)

from tests.support.triton.triton_runner import triton_runner

pytestmark = pytest.mark.gpu


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that ``call`` has allocated at once."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [1000, 32000, 131072])
def test_no_way_to_sample_takes_more_than_is_reckoned_and_the_worst_nearly_as_much(
    vocab_size: int, dtype: torch.dtype
) -> None:
    num_rows = SAMPLED_ON_GPU // vocab_size
    logits = (2 * torch.randn(num_rows, vocab_size, device=DEVICE)).to(dtype)
    found: dict[str, int] = {}
    for way, params in WAYS.items():
        rows = states(num_rows, **params)
        found[way] = peak_bytes(lambda rows=rows: sample(logits, rows))  # type: ignore[misc]
    reckoned = sampling_bytes(num_rows, vocab_size, on_cpu=False)
    assert 0.5 * reckoned < max(found.values()) <= reckoned, found


def test_more_rows_are_sampled_in_parts_and_take_no_more() -> None:
    num_rows, vocab_size = 512, 131072
    logits = torch.randn(num_rows, vocab_size, device=DEVICE).bfloat16()
    rows = states(num_rows, **WAYS["searched for"])
    reckoned = sampling_bytes(num_rows, vocab_size, on_cpu=False)
    assert reckoned < num_rows * vocab_size * 56 / 7
    assert peak_bytes(lambda: sample(logits, rows)) <= reckoned + 1000 * num_rows


@pytest.mark.parametrize("max_num_seqs", [8, 256])
def test_graphs_take_no_more_than_is_reckoned(checkpoint: Callable[..., Path], max_num_seqs: int) -> None:
    """Of all memory of the GPU, so that the driver's and cuBLAS's share counts too."""
    path = checkpoint(
        "llama",
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=32000,
        max_position_embeddings=8192,
        initializer_range=0.02,
    )
    model, runner = read_model(path), triton_runner(path, torch.bfloat16)
    max_tokens = graphed_tokens(max_num_seqs, model.max_context_tokens)
    runner.capture_decodes(CudaCapture(DEVICE), max_decodes=1, max_tokens=max_tokens)  # compiles what there is
    runner._graphs = None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info(DEVICE)[0]
    runner.capture_decodes(CudaCapture(DEVICE), max_decodes=max_num_seqs, max_tokens=max_tokens)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    taken = before - torch.cuda.mem_get_info(DEVICE)[0]
    assert taken <= graph_bytes(model, dtype=DType.BFLOAT16, max_num_seqs=max_num_seqs)
