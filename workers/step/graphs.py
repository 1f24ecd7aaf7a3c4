"""Runs steps of decodes as CUDA graphs, which launch a step's few hundred kernels at once.

A graph's kernels keep their addresses and sizes. So a step is copied to memory that stays in place, laid out for the
next larger of a few numbers of decodes. The rows left over belong to no sequence: they have no slot, so none of their
KV is written, and nobody reads what is computed in them.

Capturing needs a GPU, which tests/gpu use. All else is tested without one, by a capture that computes again.

Shapes: T tokens of a step, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention import AttentionPlan, Window
from kernels.cuda.plan import DevicePlan, fits, narrowed, put, room_for_decodes
from placement.planning.memory import MOST_GRAPHED

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, MOST_GRAPHED)
_NO_SLOT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The tokens of a step, laid out for the device: those of several sequences, side by side.

    Attributes:
        token_ids: the ids of the tokens, [T].
        positions: the positions of the tokens in their sequences, [T].
        slots: the slot that each token's KV goes to, [T].
        attention: the attention plan for each window that some layer has.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    attention: Mapping[Window, AttentionPlan]


Compute = Callable[[StepInputs], Tensor]  # logits [T, V]
Replay = Callable[[], None]


class Capture(Protocol):
    """Records the work that a device is given."""

    def __call__(self, run: Callable[[], None]) -> Replay:
        """Calls ``run`` once or more often. A call of the result repeats its work on the device, on the same memory."""


class DecodeGraphs:
    """Computes steps of decodes alone, each by the smallest graph that has room for it.

    It serves one thread and one stream.
    """

    def __init__(
        self, *, compute: Compute, inputs: "StepMemory", capture: Capture, sizes: Sequence[int] | None = None
    ) -> None:
        """Captures a graph for each of ``sizes``.

        Args:
            compute: the function to capture, which must not wait for the device.
            inputs: the memory that steps are copied to.
            capture: records the function, such as :class:`CudaCapture` does.
            sizes: numbers of decodes, ascending, none above what ``inputs`` has room for; ``graph_sizes`` by default.
        """
        self._compute = compute
        self._inputs = inputs
        self._sizes = tuple(sizes or graph_sizes(inputs.max_decodes))
        assert self._sizes[-1] <= inputs.max_decodes, self._sizes
        # These lie outside the graphs' memory, since one graph may overwrite there what another left.
        self._logits = torch.empty_like(compute(inputs.step(self._sizes[-1])))
        # The largest first, so that the smaller find their memory in the pool.
        self._replays = {size: capture(partial(self._run, size)) for size in reversed(self._sizes)}

    def can_run(self, step: StepInputs) -> bool:
        """Tells whether the step has decodes alone, and a graph has room for it."""
        return len(step.token_ids) <= self._sizes[-1] and self._inputs.can_hold(step)

    def __call__(self, step: StepInputs) -> Tensor:
        """Computes the logits [T, V] of a step for which :meth:`can_run` holds. They last until the next step."""
        num_tokens = len(step.token_ids)
        size = next_size(num_tokens, self._sizes)
        self._inputs.put(step)
        self._replays[size]()
        return self._logits[:num_tokens]

    def _run(self, size: int) -> None:
        self._logits[:size].copy_(self._compute(self._inputs.step(size)))


class StepMemory:
    """Memory that steps of decodes are copied to, so that they are always in the same place."""

    def __init__(self, *, like: StepInputs, max_decodes: int, max_tokens: int) -> None:
        """Allocates memory for steps with the windows, the number types and the device of ``like``.

        Args:
            max_decodes: the rows that there is room for.
            max_tokens: tokens that all sequences of a step may have together; a shared token counts for each of them.
        """
        device = like.token_ids.device
        self.max_decodes = max_decodes
        self._token_ids, self._positions, self._slots = (
            torch.zeros(max_decodes, dtype=rows.dtype, device=device)
            for rows in (like.token_ids, like.positions, like.slots)
        )
        self._slots.fill_(_NO_SLOT)
        self._plans = {window: room_for_decodes(max_decodes, max_tokens, window, device) for window in like.attention}

    def step(self, size: int) -> StepInputs:
        """Returns the first ``size`` rows as a step to capture."""
        return StepInputs(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            slots=self._slots[:size],
            attention={window: narrowed(plan, size) for window, plan in self._plans.items()},
        )

    def can_hold(self, step: StepInputs) -> bool:
        """Tells whether the step has decodes alone, and there is room for it."""
        return len(step.token_ids) <= self.max_decodes and all(
            fits(plan, self._plans[window]) for window, plan in _plans(step).items()
        )

    def put(self, step: StepInputs) -> None:
        """Copies a step that it can hold. The device copies it after all the work that it was given before."""
        num_tokens = len(step.token_ids)
        self._token_ids[:num_tokens].copy_(step.token_ids)
        self._positions[:num_tokens].copy_(step.positions)
        self._slots[:num_tokens].copy_(step.slots)
        self._slots[num_tokens:].fill_(_NO_SLOT)
        for window, plan in _plans(step).items():
            put(plan, self._plans[window])


class CudaCapture:
    """Captures graphs that share one pool of memory: only one of them is in use at a time."""

    def __init__(self, device: torch.device) -> None:
        """Prepares to capture work that the calling thread gives ``device``."""
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # All graphs use one stream, since cuBLAS keeps a workspace of tens of MiB for each.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Replay:
        """Captures ``run``, which it calls once before, since the first call compiles and allocates."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may do what a capture forbids its own thread, such as allocate.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                run()
        replay: Replay = graph.replay
        return replay


def graph_sizes(max_decodes: int) -> tuple[int, ...]:
    """Lists the numbers of decodes that have a graph, ascending. The last is ``max_decodes``, or MOST_GRAPHED.

    Sizes are about a third apart, since rows that belong to no sequence cost little beside reading the weights.
    """
    most = min(max_decodes, MOST_GRAPHED)
    return (*(size for size in _SIZES if size < most), most)


def next_size(num_tokens: int, sizes: Sequence[int]) -> int:
    """Returns the least of the ascending ``sizes`` that is at least ``num_tokens``, which is at most the last."""
    return sizes[bisect_left(sizes, num_tokens)]


def _plans(step: StepInputs) -> Mapping[Window, DevicePlan]:
    plans: dict[Window, DevicePlan] = {}
    for window, plan in step.attention.items():
        assert isinstance(plan, DevicePlan), type(plan)
        plans[window] = plan
    return plans
