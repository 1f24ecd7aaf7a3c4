"""Cases for the Triton kernels, which run compiled where there is a GPU and else under Triton's interpreter.

The interpreter must be chosen (TRITON_INTERPRET=1) before Triton is first imported, so without a GPU the modules that
use this run in a process of their own: tests/kernels/cuda/test_triton_interpreter.py starts it.
"""

import os
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import LayerCache, Run, SequenceSpan, num_slots
from kernels.protocol import Kernels

HAS_GPU = torch.cuda.is_available()
RUNS_HERE = HAS_GPU or os.environ.get("TRITON_INTERPRET") == "1"
REASON = "needs a GPU or TRITON_INTERPRET=1"
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = (torch.float32, torch.bfloat16)
# The interpreter cuts a number off where it is to be rounded to bfloat16: an ulp more each time.
BF16_ULP = 2**-7 if HAS_GPU else 2**-6
ROW_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: BF16_ULP}
ATTENTION_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of the standard normal distribution, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Sequences whose tokens are scattered over a cache, every one already written."""

    query: Tensor  # [T, H, D]: heads of a wider tensor, as the decoder makes them
    cache: LayerCache
    spans: tuple[SequenceSpan, ...]

    def attend(self, kernels: Kernels, window: int | None = None) -> Tensor:
        """Attention of the batch. The batch's own keys are in the cache, which is what the variants read."""
        keys = self.query[:, : self.cache.keys.shape[0]]
        scale = self.query.shape[2] ** -0.5
        return kernels.attention(self.query, keys, keys, self.cache, kernels.plan(self.spans, window=window), scale)

    def expected(self, window: int | None = None) -> Tensor:
        """The same by the reference, in float32."""
        cache = LayerCache(keys=self.cache.keys.float(), values=self.cache.values.float())
        wide = AttentionCase(query=self.query.float(), cache=cache, spans=self.spans)
        return wide.attend(reference, window).to(self.query.dtype)


def attention_case(
    lengths: list[tuple[int, int]],
    *,
    num_kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionCase:
    """``lengths``: context tokens and queries of each sequence."""
    rng = random.Random(seed)
    spans: list[SequenceSpan] = []
    free, row = 0, 0
    for context, num_queries in lengths:
        runs: list[Run] = []
        while (missing := context + num_queries - num_slots(tuple(runs))) > 0:
            free += rng.randint(0, 3)
            taken = rng.randint(1, missing)
            runs.append((free, free + taken))
            free += taken
        rng.shuffle(runs)
        spans.append(SequenceSpan(query_start=row, num_queries=num_queries, runs=tuple(runs)))
        row += num_queries
    num_heads = num_kv_heads * group
    keys, values = (normal(num_kv_heads, free + 5, head_dim, dtype=dtype, seed=seed + i) for i in (1, 2))
    used = {slot for span in spans for run in span.runs for slot in range(*run)}
    unused = [slot for slot in range(free + 5) if slot not in used]
    for cached in (keys, values):  # what no sequence owns must not be read
        cached[:, unused] = torch.nan
    query = normal(row, num_heads + num_kv_heads, head_dim, dtype=dtype, seed=seed)[:, :num_heads]
    return AttentionCase(query=query, cache=LayerCache(keys=keys, values=values), spans=tuple(spans))
