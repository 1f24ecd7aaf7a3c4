"""Steps of decodes as CUDA graphs: a step's few hundred kernels are launched at once, by the GPU itself.

A graph's kernels keep their addresses and sizes, so a step is copied to memory that stays where it is, laid out for
the next larger of a few numbers of decodes. The rows left over belong to no sequence: they have no slot, so nothing of
them is written, and what is computed in them is not looked at.

Capturing needs a GPU, and is exercised by tests/gpu; what goes in and comes out is tested without one.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.cuda.plan import DevicePlan, fits, narrowed, put, room_for_decodes
from workers.decoder import RopeTables, TokenBatch, Window

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_NO_SLOT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What a step gives.

    Attributes:
        hidden: the last layer's output [T, E], before the final norm.
        logits: those of every row [T, V], where they came along; else None.
    """

    hidden: Tensor
    logits: Tensor | None


Compute = Callable[[TokenBatch], Computed]
Replay = Callable[[], None]
# Records a computation: its result, which calling the other computes again in the same place.
Capture = Callable[[Callable[[], Computed]], tuple[Computed, Replay]]


class DecodeGraphs:
    """Computes steps: those of decodes alone by graphs, all others as they are. Itself a ``Compute``.

    A result lasts until the next step. Not for several threads, nor for several streams.
    """

    def __init__(
        self, *, compute: Compute, inputs: "StepMemory", capture: Capture, sizes: Sequence[int] = SIZES
    ) -> None:
        """Captures a graph for each of ``sizes`` that ``inputs`` has room for.

        Args:
            compute: what is captured, and computes every other step. It must not wait for the device, and give
                logits.
            inputs: where steps are put.
            capture: such as :class:`CudaCapture`.
            sizes: numbers of decodes, ascending.
        """
        self._compute = compute
        self._inputs = inputs
        self._sizes = tuple(size for size in sizes if size <= inputs.max_decodes)
        # The largest first, so that the smaller find their memory in the pool.
        self._graphs = {size: capture(partial(compute, inputs.step(size))) for size in reversed(self._sizes)}

    def __call__(self, tokens: TokenBatch) -> Computed:
        num_tokens = len(tokens.token_ids)
        size = next_size(num_tokens, self._sizes)
        if size is None or not self._inputs.can_hold(tokens):
            return self._compute(tokens)
        self._inputs.put(tokens)
        computed, replay = self._graphs[size]
        replay()
        logits = None if computed.logits is None else computed.logits[:num_tokens]
        return Computed(hidden=computed.hidden[:num_tokens], logits=logits)


class StepMemory:
    """Memory that a step of decodes is copied to, so that it is always in the same place."""

    def __init__(self, *, like: TokenBatch, max_decodes: int, max_tokens: int) -> None:
        """Of the windows, number types and head dimension of ``like``, a step that was laid out for the device.

        Args:
            max_decodes: rows that there is room for.
            max_tokens: tokens that all sequences of a step may have together, shared ones counted for each.
        """
        device = like.token_ids.device
        self.max_decodes = max_decodes
        self._token_ids = torch.zeros(max_decodes, dtype=like.token_ids.dtype, device=device)
        self._slots = torch.full((max_decodes,), _NO_SLOT, dtype=like.slots.dtype, device=device)
        self._rope = {window: _room_for_tables(tables, max_decodes) for window, tables in like.rope.items()}
        self._plans = {window: room_for_decodes(max_decodes, max_tokens, window, device) for window in like.attention}

    def step(self, size: int) -> TokenBatch:
        """The first ``size`` rows, as the step to capture."""
        return TokenBatch(
            token_ids=self._token_ids[:size],
            slots=self._slots[:size],
            rope={w: RopeTables(cos=tables.cos[:size], sin=tables.sin[:size]) for w, tables in self._rope.items()},
            attention={window: narrowed(plan, size) for window, plan in self._plans.items()},
        )

    def can_hold(self, tokens: TokenBatch) -> bool:
        """Whether the step is one of decodes alone, and there is room for it."""
        return len(tokens.token_ids) <= self.max_decodes and all(
            fits(plan, self._plans[window]) for window, plan in _plans(tokens).items()
        )

    def put(self, tokens: TokenBatch) -> None:
        """Copies a step that it can hold. The device does it when it has done all that it was given before."""
        num_tokens = len(tokens.token_ids)
        self._token_ids[:num_tokens].copy_(tokens.token_ids)
        self._slots.fill_(_NO_SLOT)
        self._slots[:num_tokens].copy_(tokens.slots)
        for window, tables in tokens.rope.items():
            self._rope[window].cos[:num_tokens].copy_(tables.cos)
            self._rope[window].sin[:num_tokens].copy_(tables.sin)
        for window, plan in _plans(tokens).items():
            put(plan, self._plans[window])


class CudaCapture:
    """Captures graphs that share one pool of memory: only one of them is in use at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Computed]) -> tuple[Computed, Replay]:
        """Runs it once beforehand: what is compiled or allocated at first cannot be captured."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with what a capture forbids its own, such as allocating.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                computed = run()
        return computed, graph.replay


def next_size(num_tokens: int, sizes: Sequence[int]) -> int | None:
    """The least of the ascending ``sizes`` that is not below ``num_tokens``; None where there is none."""
    index = bisect_left(sizes, num_tokens)
    return sizes[index] if index < len(sizes) else None


def _room_for_tables(like: RopeTables, num_rows: int) -> RopeTables:
    cos, sin = (
        torch.zeros(num_rows, *table.shape[1:], dtype=table.dtype, device=table.device)
        for table in (like.cos, like.sin)
    )
    return RopeTables(cos=cos, sin=sin)


def _plans(tokens: TokenBatch) -> Mapping[Window, DevicePlan]:
    plans: dict[Window, DevicePlan] = {}
    for window, plan in tokens.attention.items():
        assert isinstance(plan, DevicePlan), type(plan)
        plans[window] = plan
    return plans
