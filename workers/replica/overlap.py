"""Measures, when the ranks of a stage start, which steps are faster in two micro-batches that overlap.

See :mod:`placement.measured.overlap`.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from placement.measured.overlap import OverlapTable, measured_sizes
from workers.collectives.algorithms import direct
from workers.collectives.group import TensorGroup
from workers.collectives.measure import slowest
from workers.model.overlapped import run_alone, run_overlapped
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput

_RUNS = 3  # after a first one, which compiles what is not there yet
_NUM_LAYERS = 2
_LONG_S = 0.5


@torch.inference_mode()
def measure_overlap(
    runner: ModelRunner,
    group: TensorGroup,
    *,
    token_budget: int,
    num_slots: int,
    compiled: Callable[[], None] = lambda: None,
) -> OverlapTable:
    """Measures the table of this stage, which is the same at every rank.

    All ranks of the stage call it at the same time, before any request. Steps of more and more tokens run through a few
    layers, until that takes long; they write to the first slots of the cache. ``compiled`` is called after the first.

    Raises:
        PeerFailed: a rank was lost.
    """
    sizes: list[int] = []
    measured: list[Tensor] = []
    for num_tokens in measured_sizes(min(token_budget, num_slots)):
        took_s = slowest(group, torch.tensor(_measure(runner, group, num_tokens, compiled), dtype=torch.float64))
        sizes.append(num_tokens)
        measured.append(took_s)
        if took_s.max() > _LONG_S:
            break
    alone_s, overlapped_s = ([float(took_s[index]) for took_s in measured] for index in range(2))
    return OverlapTable(num_tokens=tuple(sizes), alone_s=tuple(alone_s), overlapped_s=tuple(overlapped_s))


def _measure(
    runner: ModelRunner, group: TensorGroup, num_tokens: int, compiled: Callable[[], None]
) -> tuple[float, float]:
    """Returns the seconds of a step in one micro-batch and in two: the best of a few runs of each, taken in turns."""
    sequence = SequenceInput(token_ids=[0] * num_tokens, start=0, runs=((0, num_tokens),))
    batch = Batch(sequences=(sequence,))
    alone, overlapped = runner.lay_out(batch), runner.lay_out_overlapped(batch)
    x = torch.ones(num_tokens, runner.hidden_size, dtype=runner.dtype, device=alone.inputs.token_ids.device)
    best_s = [float("inf")] * 2
    for number in range(1 + _RUNS):
        runs: tuple[Callable[[], object], ...] = (
            lambda: run_alone(
                runner.run_layers(alone.inputs, x, in_program=True, num_layers=_NUM_LAYERS), group.reduce
            ),
            lambda: run_overlapped(runner.micro_batches(overlapped, x, _NUM_LAYERS), group.begin_reduce),
        )
        for index, run in enumerate(runs):
            group.run(direct, torch.zeros(1))  # so that all ranks begin together
            began_s = time.monotonic()
            run()
            group.settle()
            if number:
                best_s[index] = min(best_s[index], time.monotonic() - began_s)
        compiled()
    return best_s[0], best_s[1]
