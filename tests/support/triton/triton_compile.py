"""Compiles the Triton kernels for a GPU that is not there: ``python -m tests.support.triton.triton_compile 90``.

Calls the operations as a decoder would, with a driver that knows its GPU's architecture and nothing else, and compiles
what they would launch. Prints one line of JSON for each kernel: its name, number type of its first argument, bytes of
shared memory, and bytes of a thread's local memory, which is where registers that are short spill to.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import reference
from kernels.attention import LayerCache, PartSpan, SequenceSpan
from kernels.cuda import attention, parts, quantized
from kernels.cuda.parts_plan import plan_parts
from kernels.cuda.plan import SharedParts, plan_step
from kernels.cuda.quantized_tiles import tiled
from kernels.cuda.variant import open_kernels
from kernels.rounded import RoundedWeight

HIDDEN, FFN, HEADS, KV_HEADS = 4096, 14336, 32, 8
SPANS = (
    SequenceSpan(query_start=0, num_queries=1, runs=((0, 600),)),
    SequenceSpan(query_start=1, num_queries=1, runs=((0, 500), (890, 900))),
    SequenceSpan(query_start=2, num_queries=6, runs=((600, 890),)),
)
SHARED = (SharedParts(members=(0, 1), first=0, stop=1),)
NUM_TOKENS = 8
CPU = torch.device("cpu")


class AbsentGpu:
    """The driver of a GPU of some architecture, as far as compiling asks for one."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_only(kernel: JITFunction, grid: Any) -> Callable[..., None]:
    """In place of a launch."""

    def launch(*args: Any, **options: Any) -> None:
        compiled = kernel.run(*args, grid=grid, warmup=True, enable_fp_fusion=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        (local,) = re.findall(r"STACK:(\d+)", usage)
        found = {
            "name": kernel.fn.__name__,
            "dtype": str(args[0].dtype),
            "shared_bytes": compiled.metadata.shared,
            "local_bytes": int(local),
        }
        print(json.dumps(found), flush=True)

    return launch


def run_rows(dtype: torch.dtype) -> None:
    """Everything but attention, in the shapes of Llama 3 8 B."""
    kernels = open_kernels(CPU)
    x, weight = torch.zeros(NUM_TOKENS, HIDDEN, dtype=dtype), torch.zeros(HIDDEN, dtype=dtype)
    kernels.rms_norm(x, weight, 1e-5)
    kernels.add_rms_norm(x, x.clone(), weight, 1e-5)
    gate_up = torch.zeros(NUM_TOKENS, 2 * FFN, dtype=dtype)
    kernels.silu_mul(gate_up)
    kernels.gelu_mul(gate_up)
    head_dim = HIDDEN // HEADS
    heads = torch.zeros(NUM_TOKENS, HEADS + 2 * KV_HEADS, head_dim, dtype=dtype)
    kernels.rms_norm(heads[:, :-KV_HEADS], torch.zeros(HEADS + KV_HEADS, head_dim, dtype=dtype), 1e-5)
    tables = reference.rope_tables(torch.arange(NUM_TOKENS), reference.rope_frequencies(head_dim, 1e4), dtype)
    kernels.rotate(heads[:, :-KV_HEADS], *tables)
    keys, values = torch.zeros(2, KV_HEADS, 900, head_dim, dtype=dtype)
    cache = LayerCache(keys=keys, values=values)
    kernels.write_kv(cache, torch.arange(NUM_TOKENS), heads[:, HEADS:-KV_HEADS], heads[:, -KV_HEADS:])


def run_attention(dtype: torch.dtype, head_dim: int, window: int | None) -> None:
    """Decodes in several parts, one of them shared, and a chunk."""
    keys = torch.zeros(KV_HEADS, 900, head_dim, dtype=dtype)
    query = torch.zeros(NUM_TOKENS, HEADS + KV_HEADS, head_dim, dtype=dtype)[:, :HEADS]
    cache, plan = LayerCache(keys=keys, values=keys), plan_step(SPANS, window, CPU, SHARED)
    attention.attention(query, query, query, cache, plan, 1.0)
    runs = np.array([[0, 900]])
    for num_queries in (1, 6):
        seen = np.tile([[100, 900]], (num_queries, 1))
        spans = [PartSpan(query_start=0, runs=runs, seen=seen)]
        parts.attend_parts(query, cache, plan_parts(spans, CPU), 1.0)


def run_quantized(dtype: torch.dtype, bits: int, num_tokens: int, *, offsets: bool) -> None:
    """A product whose inputs are cut into parts, and the weight written out."""
    codes = torch.zeros(HIDDEN, HIDDEN * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.zeros(HIDDEN, HIDDEN // 128)
    weight = tiled(RoundedWeight(codes=codes, scales=scales, offsets=scales if offsets else None))
    x, bias = torch.zeros(num_tokens, HIDDEN, dtype=dtype), torch.zeros(HIDDEN, dtype=dtype)
    quantized.multiply(x, weight, bias, torch.zeros(HIDDEN, dtype=torch.int32))
    quantized.widened(weight, 0, HIDDEN, dtype)


def main() -> None:
    triton.runtime.driver.set_active(AbsentGpu(int(sys.argv[1])))
    JITFunction.__getitem__ = compile_only
    attention.widens = parts.widens = quantized._is_interpreted = lambda tensor: False  # that is for the interpreter
    quantized.num_multiprocessors = lambda device: 132
    run_rows(torch.bfloat16)
    run_attention(torch.float32, 128, None)
    for head_dim, window in ((64, None), (128, None), (128, 1000), (256, 1000)):
        run_attention(torch.bfloat16, head_dim, window)
    run_quantized(torch.float32, 4, 1, offsets=True)
    for bits, num_tokens, offsets in ((4, 1, False), (8, 1, True), (4, 32, True), (8, 64, False), (4, 200, True)):
        run_quantized(torch.bfloat16, bits, num_tokens, offsets=offsets)


if __name__ == "__main__":
    main()
