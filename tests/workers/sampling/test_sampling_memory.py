"""Checks that sampling allocates what placement.planning.memory reckons, on a CPU that takes all rows at once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from placement.planning.memory import SAMPLED_ON_CPU, sampling_bytes
from tests.support.allocations import peak_bytes
from workers.sampling.sampling import SamplerState, SamplingParams, sample

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "biased": {"bias": ((3, 1.0),), "presence_penalty": 0.5},
    "open": {"temperature": 1.0, "min_p": 0.001},
    "few": {"temperature": 1.0, "top_k": 50},
    "many": {"temperature": 1.0, "top_k": 1024},
    "nucleus": {"temperature": 0.5, "top_p": 0.9},
    "searched for": {"temperature": 3.0, "top_k": 5000, "top_p": 0.9, "min_p": 1e-9},
    "log-probabilities": {"logprobs": 1024},
}


class Grammar:
    """A mask that allows every other token."""

    done = False

    def fill(self, row: Tensor) -> bool:
        row.fill_(0x55555555)
        return True

    def accept(self, token_id: int) -> None:
        pass


def states(num_rows: int, **params: Any) -> list[SamplerState]:
    """Makes states, of which every other one has a grammar."""
    return [
        SamplerState(SamplingParams(seed=row, **params), (), grammar=Grammar() if row % 2 else None)
        for row in range(num_rows)
    ]


def draws(logits: Tensor, **params: Any) -> int:
    """Measures the peak of sampling all rows with the same parameters."""
    rows = states(len(logits), **params)
    return peak_bytes(lambda: sample(logits, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [100, 1000, 2000, 8192, 32000, 65535, 151936])
def test_no_way_to_sample_takes_more_than_is_reckoned_and_the_worst_nearly_as_much(
    vocab_size: int, dtype: torch.dtype
) -> None:
    num_rows = max(1, SAMPLED_ON_CPU // vocab_size)
    logits = (2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = {way: draws(logits, **params) for way, params in WAYS.items()}
    reckoned = sampling_bytes(num_rows, vocab_size, on_cpu=True)
    worst = max(found, key=found.__getitem__)
    # Few logits are ties in float32, and ties take more.
    assert (0.75 if dtype is torch.bfloat16 else 0.6) * reckoned < found[worst] <= reckoned, found


def test_a_mixed_batch_takes_no_more_than_its_worst_row() -> None:
    vocab_size = 8192
    num_rows = SAMPLED_ON_CPU // vocab_size
    logits = torch.randn(num_rows, vocab_size).bfloat16()
    ways = list(WAYS.values())
    rows = [state for row in range(num_rows) for state in states(1, **ways[row % len(ways)])]
    assert peak_bytes(lambda: sample(logits, rows)) <= sampling_bytes(num_rows, vocab_size, on_cpu=True)


@pytest.mark.parametrize("vocab_size", [1000, 32000])
def test_more_rows_are_sampled_in_parts_and_take_no_more(vocab_size: int) -> None:
    """Only a few numbers a row come on top."""
    num_rows = 5 * (SAMPLED_ON_CPU // vocab_size)
    reckoned = sampling_bytes(num_rows, vocab_size, on_cpu=True)
    assert reckoned == sampling_bytes(num_rows // 5, vocab_size, on_cpu=True)
    logits = torch.randn(num_rows, vocab_size)
    assert draws(logits, **WAYS["searched for"]) <= reckoned + 1000 * num_rows


def test_a_gpu_looks_at_more_rows_together() -> None:
    on_cpu, on_gpu = (sampling_bytes(256, 128_256, on_cpu=on_cpu) for on_cpu in (True, False))
    assert on_cpu == 4 * on_gpu / 65
    assert 400 * 2**20 < on_gpu < 500 * 2**20
    assert sampling_bytes(3, 200_000, on_cpu=True) == sampling_bytes(2, 200_000, on_cpu=True)
    assert sampling_bytes(4, 1 << 24, on_cpu=False) == sampling_bytes(1, 1 << 24, on_cpu=False)
