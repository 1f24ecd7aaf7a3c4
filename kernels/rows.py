"""Norms and gated activations of bfloat16 rows, each in one pass over memory: see :mod:`kernels.rows_ir`.

Written as separate operations of torch, a norm goes through a long prompt's activations eight times, which costs a
tenth of its prefill.

Shapes: T tokens of a batch, E hidden size, F feed-forward size.
"""

import struct
from functools import cache

import torch
from torch import Tensor

from kernels import machine_code, reference, threads
from kernels.rows_ir import HEADER, LANES, norm, silu_mul_row, work

# Below this many numbers one thread has done the work before a second has begun.
_SHARED_FROM = 1 << 15
_TICKETS_PER_THREAD = 4
_NORM_POINTERS = ("update", "residual", "weight", "normed", "total")


def is_supported(*tensors: Tensor) -> bool:
    """Whether all are dense rows of bfloat16 in whole vectors, on a CPU that rounds to bfloat16 by itself.

    The functions run those of :mod:`kernels.reference` where this is not so.
    """
    fits = all(x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[-1] % LANES == 0 for x in tensors)
    return fits and "avx512bf16" in machine_code.cpu_features()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As :func:`kernels.reference.rms_norm`, of ``x`` [T, E] and ``weight`` [E]."""
    if x.dim() != 2 or not is_supported(x, weight):
        return reference.rms_norm(x, weight, eps)
    assert weight.shape == x.shape[1:], (x.shape, weight.shape)
    normed = torch.empty_like(x)
    width = x.shape[1] * 2
    pointers = (x.data_ptr(), x.data_ptr(), weight.data_ptr(), normed.data_ptr(), x.data_ptr())
    _run("norm", x, pointers, (width, width, 0, width, width), (x.shape[1], float_bits(eps)))
    return normed


def add_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As :func:`kernels.reference.add_rms_norm`; the sum is written over ``residual``."""
    if not is_supported(update, residual, weight):
        return reference.add_rms_norm(update, residual, weight, eps)
    assert update.shape == residual.shape and weight.shape == residual.shape[1:], (update.shape, weight.shape)
    normed = torch.empty_like(residual)
    width = residual.shape[1] * 2
    pointers = tuple(x.data_ptr() for x in (update, residual, weight, normed, residual))
    _run("add_norm", residual, pointers, (width, width, 0, width, width), (residual.shape[1], float_bits(eps)))
    return normed, residual


def silu_mul(gate_up: Tensor) -> Tensor:
    """As :func:`kernels.reference.silu_mul`, of ``gate_up`` [T, 2F]."""
    if not is_supported(gate_up) or gate_up.shape[1] % (2 * LANES):
        return reference.silu_mul(gate_up)
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(num_tokens, width)
    _run("silu_mul", gate_up, (gate_up.data_ptr(), output.data_ptr()), (4 * width, 2 * width), (width,))
    return output


def float_bits(value: float) -> int:
    """A float32 as it is passed in 64 bits."""
    return int.from_bytes(struct.pack("<f", value), "little")


def _run(
    name: str, rows: Tensor, pointers: tuple[int, ...], strides: tuple[int, ...], scalars: tuple[int, ...]
) -> None:
    """Calls a function for each of ``rows`` [T, ...]."""
    if not len(rows):
        return
    ticket = torch.zeros(1, dtype=torch.int64)
    num_threads = min(torch.get_num_threads(), len(rows)) if rows.numel() >= _SHARED_FROM else 1
    fields = (*pointers, *strides, *scalars)
    threads.run(*each_row(name, len(rows), rows.numel(), num_threads, ticket.data_ptr(), fields), num_threads)


def each_row(
    name: str, num_rows: int, size: int, num_threads: int, ticket: int, fields: tuple[int, ...]
) -> tuple[int, bytes]:
    """The work of a function on rows, of ``size`` numbers in all, and its job.

    Args:
        name: of the function, see :func:`_compiled`.
        num_rows: how many rows there are.
        size: few numbers are left to one thread.
        num_threads: that share the work.
        ticket: address of a zero.
        fields: its pointers, their strides in bytes, and scalars, as :func:`kernels.rows_ir.work` orders them.
    """
    unit = num_rows if size < _SHARED_FROM else -(-num_rows // (num_threads * _TICKETS_PER_THREAD))
    job = (ticket, num_rows, unit, *fields)
    return _compiled()[f"{name}_work"], struct.pack(f"={len(job)}q", *job)


@cache
def _compiled() -> dict[str, int]:
    """Where the code is, by name."""
    pointers = [(name, f"{name}_stride") for name in _NORM_POINTERS]
    scalars = [("i64", "width"), ("float", "eps")]
    ir = HEADER + "".join(
        (
            norm("norm", adds=False),
            norm("add_norm", adds=True),
            silu_mul_row("silu_mul"),
            work("norm", pointers, scalars),
            work("add_norm", pointers, scalars),
            work("silu_mul", [("gate_up", "gate_up_stride"), ("output", "output_stride")], scalars[:1]),
        )
    )
    return machine_code.addresses(ir, ["norm_work", "add_norm_work", "silu_mul_work"])
