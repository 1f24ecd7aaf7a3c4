"""A model cut over ranks that compute with Triton's operations, against transformers, on some checkpoints."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from placement.measured.collectives import AllReduceTable
from placement.measured.exchange import Exchange
from placement.planning.layout import Split
from tests.support.oracle import CHECKPOINTS, continue_greedily, greedy_each, oracle_logits
from tests.support.ranks import BLOCK_SIZE, ranks
from tests.support.triton.triton_cases import DEVICE, HAS_GPU, REASON, RUNS_HERE

if not RUNS_HERE:
    pytest.skip(REASON, allow_module_level=True)

from kernels.cuda.variant import open_kernels

TOKEN_IDS = [i * 31 % 509 for i in range(40)]
RUNS = ((8, 48),)
PROMPTS = [TOKEN_IDS[:1], TOKEN_IDS[3:28]]
NUM_OUTPUTS = 2  # a prefill's and a decode's
CASES: list[tuple[str, Split, tuple[int, ...], Exchange | None, str]] = [
    ("gemma3", "sequence", (3, 1), Exchange.ALL_GATHER, "direct"),
    ("mistral", "sequence", (1, 1), Exchange.TOKEN_RING, "direct"),
    ("plain", "sequence", (5, 2, 1), Exchange.RING, "direct"),
    ("gemma3", "tensor", (2, 1), None, "scatter"),
    ("qwen3", "tensor", (1, 1), None, "direct"),
]


class OneAtATime:
    """Operations for several threads: the interpreter is one for the whole process."""

    def __init__(self) -> None:
        self._kernels, self._lock = open_kernels(DEVICE), threading.Lock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self._kernels, name)

        def locked(*args: Any, **options: Any) -> Any:
            with self._lock:
                return operation(*args, **options)

        return locked


@pytest.mark.parametrize(("name", "split", "shares", "way", "sums"), CASES)
def test_ranks_of_triton_compute_what_transformers_does(
    checkpoint: Callable[..., Path],
    name: str,
    split: Split,
    shares: tuple[int, ...],
    way: Exchange | None,
    sums: str,
) -> None:
    family, config = CHECKPOINTS[name]
    path = checkpoint(family, **config)
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    device_name = "cuda:0" if HAS_GPU else "cpu"
    with ranks(path, shares, split=split, way=way, kernels=OneAtATime(), device_name=device_name) as cut:
        for rank in range(len(shares)):
            cut.membership(rank).group.table = AllReduceTable(sizes=(1,), names=(sums,))
        expected = oracle_logits(oracle, TOKEN_IDS).log_softmax(dim=-1)
        torch.testing.assert_close(cut.log_probs(TOKEN_IDS, RUNS), expected, atol=1e-4, rtol=1e-4)
        answers = greedy_each(oracle, PROMPTS, NUM_OUTPUTS)
        assert continue_greedily(cut, PROMPTS, 20, NUM_OUTPUTS, block_size=BLOCK_SIZE) == answers
