"""Makes the thread that executes steps, and warms it up before the first request."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from kernels import reference
from kernels.protocol import Kernels
from placement.measured.step_times import StepTimes, is_believed, next_size, seconds
from placement.model.part import Span
from placement.model.specs import ModelSpec
from placement.planning.memory import graphed_tokens
from placement.serving.token_budget import StepBudget
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.types import Runner
from workers.host.cores import claim_cores
from workers.host.device import Device, use_device
from workers.sampling.sampling import SamplerState, SamplingParams
from workers.step.graphs import Capture, CudaCapture
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput

logger = logging.getLogger(__name__)


def executing_thread(device: Device, count: int = 1) -> ThreadPoolExecutor:
    """Makes the thread that executes steps, or ``count`` threads that take turns.

    On a CPU, these threads and those that help them keep to cores that this rank claims.
    """
    if device.torch_device.type != "cpu":
        begin = partial(use_device, device.torch_device)
        return ThreadPoolExecutor(count, thread_name_prefix="runner", initializer=begin)
    claim = claim_cores(device.num_threads)
    return ThreadPoolExecutor(count, thread_name_prefix="runner", initializer=claim.pin)


def capture_for(device: torch.device, kernels: Kernels) -> Capture | None:
    """Returns what records steps of decodes as graphs.

    It is None on a CPU, and on GPUs that run the reference, which waits for the device in between.
    """
    if device.type != "cuda" or kernels is reference:
        return None
    return CudaCapture(device)


def warm_up(runner: Runner, *, model: ModelSpec, request: pb.LoadRequest, given_up: Span | None = None) -> StepTimes:
    """Runs steps of growing size before the first request, and returns how long they take.

    So the first request does not pay for compiled code, first-touch and thread start. The first step has one token;
    see :func:`placement.measured.step_times.next_size` for the others, which the time of those before them bounds. The
    last is a decode behind the largest chunk.

    Args:
        given_up: the KV blocks that they write to, whose names attention workers forget; None: any.
    """
    blocks = given_up or Span(0, request.num_blocks)
    forgotten = () if given_up is None else tuple(range(given_up.start, given_up.stop))
    first = blocks.start * request.block_size
    most_tokens = min(request.token_budget, len(blocks) * request.block_size - 1, model.max_context_tokens - 1)
    step_time_s = request.step_time_s if request.HasField("step_time_s") else None
    times, spent_s, size = StepTimes(), 0.0, 0
    while (
        following := next_size(times, most_tokens=most_tokens, spent_s=spent_s, step_time_s=step_time_s)
    ) is not None:
        size = following
        duration_s = _run(runner, start=0, num_tokens=size, first_slot=first, forgotten=forgotten)
        if not is_believed(times, size, duration_s, step_time_s=step_time_s):
            again_s = _run(runner, start=0, num_tokens=size, first_slot=first, forgotten=forgotten)
            duration_s = min(duration_s, again_s)
            spent_s += again_s
        spent_s += duration_s
        times = times.with_step(size, duration_s)
    if size:
        _run(runner, start=size, num_tokens=1, first_slot=first, forgotten=forgotten)
    return times


def log_budget(budget: StepBudget) -> None:
    """Logs how large steps are at the most, and how long such a step takes."""
    cause = "by what was measured" if budget.is_auto else "as set"
    extra = said(
        "step_budget",
        token_budget=budget.token_budget,
        auto=budget.is_auto,
        expected_s=round(budget.expected_s, 4),
        measured=str(budget.times),
    )
    words = "A step has at most %d tokens, %s; so many take about %s s."
    logger.info(words, budget.token_budget, cause, seconds(budget.expected_s), extra=extra)


def _run(runner: Runner, *, start: int, num_tokens: int, first_slot: int, forgotten: tuple[int, ...]) -> float:
    """Runs a step of one sequence, which has ``start`` tokens before it, and returns its seconds."""
    sequence = SequenceInput(
        token_ids=[0] * num_tokens,
        start=start,
        runs=((first_slot, first_slot + start + num_tokens),),
        sampler=SamplerState(SamplingParams(), ()),
        samples=True,
    )
    return runner.prepare(Batch(sequences=(sequence,), forgotten=forgotten))().duration_s


def capture_decodes(runner: ModelRunner, request: pb.LoadRequest, capture: Capture) -> None:
    """Records steps of decodes. Call it on the thread that executes them."""
    max_tokens = graphed_tokens(request.max_num_seqs, request.max_context_tokens)
    runner.capture_decodes(capture, max_decodes=request.max_num_seqs, max_tokens=max_tokens)
