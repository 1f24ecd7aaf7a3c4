"""Measures, when the ranks start, what the choice of an exchange depends on: links, and each rank's attention."""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernels.attention import LayerCache, PartSpan
from kernels.protocol import Kernels
from placement.measured.exchange import ExchangeSpeeds
from placement.model.specs import ModelSpec
from workers.collectives.group import TensorGroup
from workers.collectives.measure import IN_A_ROW

_RUNS = 3
_BYTES = 1 << 21
_NUM_QUERIES, _NUM_TOKENS = 64, 1024


def measure_speeds(
    group: TensorGroup, *, model: ModelSpec, kernels: Kernels, dtype: torch.dtype, device: torch.device
) -> ExchangeSpeeds:
    """Measures the speeds, which are the same at every rank. Raises PeerFailed.

    All ranks call it at the same time. A link counts by the best of a few runs, at the slowest rank.
    """
    large = torch.zeros(_BYTES, dtype=torch.uint8)
    _rounds(group, large)  # because new connections are slow at first
    latency_s = _best(lambda: _rounds(group, torch.zeros(1, dtype=torch.uint8))) / IN_A_ROW
    moved_s = max(_best(lambda: _rounds(group, large)) / IN_A_ROW - latency_s, 1e-9)
    attended_s, call_s = _attention_s(model, kernels, dtype, device)
    own = torch.tensor([latency_s, moved_s, _NUM_QUERIES * _NUM_TOKENS / attended_s, call_s], dtype=torch.float64)
    by_rank = _gather(group, own)
    return ExchangeSpeeds(
        latency_s=max(float(rank[0]) for rank in by_rank),
        bytes_per_s=_BYTES / max(float(rank[1]) for rank in by_rank),
        pairs_per_s=tuple(float(rank[2]) for rank in by_rank),
        call_s=max(float(rank[3]) for rank in by_rank),
    )


def _best(run: Callable[[], None]) -> float:
    """Returns the least seconds of a few runs."""
    times_s = []
    for _ in range(_RUNS):
        began_s = time.monotonic()
        run()
        times_s.append(time.monotonic() - began_s)
    return min(times_s)


def _rounds(group: TensorGroup, x: Tensor) -> None:
    """Has every rank send to the next and receive from the one before, a few times."""
    after, before = (group.rank + 1) % group.num_ranks, (group.rank - 1) % group.num_ranks
    for _ in range(IN_A_ROW):
        group.exchange({after: x}, {before: torch.empty_like(x)})


def _gather(group: TensorGroup, own: Tensor) -> list[Tensor]:
    """Returns all ranks' tensors, at every rank."""
    others = {rank: torch.empty_like(own) for rank in range(group.num_ranks) if rank != group.rank}
    group.exchange(dict.fromkeys(others, own), others)
    return [own if rank == group.rank else others[rank] for rank in range(group.num_ranks)]


def _attention_s(model: ModelSpec, kernels: Kernels, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Returns the seconds of some queries' attention to many tokens, less those to one token, and the latter."""
    shape = (model.num_kv_heads, _NUM_TOKENS, model.head_dim)
    cache = LayerCache(
        keys=torch.zeros(shape, dtype=dtype, device=device), values=torch.zeros(shape, dtype=dtype, device=device)
    )
    query = torch.zeros(_NUM_QUERIES, model.num_heads, model.head_dim, dtype=dtype, device=device)

    def seconds(num_tokens: int) -> float:
        seen = np.tile(np.array([0, num_tokens]), (_NUM_QUERIES, 1))
        plan = kernels.plan_parts([PartSpan(query_start=0, runs=np.array([[0, num_tokens]]), seen=seen)])
        # The result is copied to the host, so the device is done then.
        return _best(lambda: _use(kernels.attend_parts(query, cache, plan, 1.0)[1].cpu()))

    call_s = seconds(1)
    return max(seconds(_NUM_TOKENS) - call_s, 1e-9), call_s


def _use(_: Tensor) -> None:
    """Does nothing; its argument must have been computed."""
