"""Makes the thread that executes steps, and warms it up before the first request."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from kernels import reference
from kernels.protocol import Kernels
from placement.model.specs import ModelSpec
from placement.planning.memory import graphed_tokens
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.types import Runner
from workers.host.cores import claim_cores
from workers.host.device import Device, use_device
from workers.sampling.sampling import SamplerState, SamplingParams
from workers.step.graphs import Capture, CudaCapture
from workers.step.runner import ModelRunner
from workers.step.types import Batch, SequenceInput


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


def warm_up(runner: Runner, *, model: ModelSpec, request: pb.LoadRequest) -> None:
    """Runs one prefill and one decode, so that the first request does not pay for first-touch and thread start."""
    num_slots = request.num_blocks * request.block_size
    num_tokens = min(request.token_budget, num_slots - 1, model.max_context_tokens - 1)
    for start, count in ((0, num_tokens), (num_tokens, 1)) if num_tokens > 0 else ():
        sequence = SequenceInput(
            token_ids=[0] * count,
            start=start,
            runs=((0, start + count),),
            sampler=SamplerState(SamplingParams(), ()),
            samples=True,
        )
        runner.prepare(Batch(sequences=(sequence,)))()


def capture_decodes(runner: ModelRunner, request: pb.LoadRequest, capture: Capture) -> None:
    """Records steps of decodes. Call it on the thread that executes them."""
    max_tokens = graphed_tokens(request.max_num_seqs, request.max_context_tokens)
    runner.capture_decodes(capture, max_decodes=request.max_num_seqs, max_tokens=max_tokens)
