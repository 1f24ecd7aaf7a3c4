"""Norms and gated activations of bfloat16 rows, each in one pass over memory: see :mod:`kernels.cpu.rows.rows_ir`.

Written as separate operations of torch, a norm goes through a long prompt's activations eight times, which costs a
tenth of its prefill.

Shapes: T tokens of a batch, E hidden size, F feed-forward size.
"""

import struct
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.machine import machine_code, threads
from kernels.cpu.rows.rows_ir import HEADER, LANES, gated_row, norm, work

# Below this many numbers one thread has done the work before a second has begun.
_SHARED_FROM = 1 << 15
_TICKETS_PER_THREAD = 4
ACTIVATIONS = ("silu", "gelu_tanh")
_NORM_POINTERS = ("update", "residual", "weight", "normed", "total")


def is_supported(*tensors: Tensor) -> bool:
    """Whether all are dense rows of bfloat16 in whole vectors, on a CPU that rounds to bfloat16 by itself.

    The functions run those of :mod:`kernels.reference` where this is not so.
    """
    fits = all(x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[-1] % LANES == 0 for x in tensors)
    return fits and "avx512bf16" in machine_code.cpu_features()


def takes(weight: Tensor) -> bool:
    """Whether there is code for a norm's weight."""
    return weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As :func:`kernels.reference.rms_norm`, of ``x`` [T, E] and ``weight`` [E]."""
    if x.dim() != 2 or not (is_supported(x) and takes(weight)):
        return reference.rms_norm(x, weight, eps)
    normed = torch.empty_like(x)
    _run(norm_name(weight, adds=False), x, norm_fields(x, x, weight, normed, eps))
    return normed


def add_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As :func:`kernels.reference.add_rms_norm`; the sum is written over ``residual``."""
    if not (is_supported(update, residual) and takes(weight)):
        return reference.add_rms_norm(update, residual, weight, eps)
    assert update.shape == residual.shape, (update.shape, residual.shape)
    normed = torch.empty_like(residual)
    _run(norm_name(weight, adds=True), residual, norm_fields(update, residual, weight, normed, eps))
    return normed, residual


def norm_name(weight: Tensor, *, adds: bool) -> str:
    """The function for a norm with this weight; with ``adds``, of a sum, which is kept in place of ``residual``."""
    return ("add_norm" if adds else "norm") + ("_wide" if weight.dtype == torch.float32 else "")


def norm_fields(update: Tensor, residual: Tensor, weight: Tensor, normed: Tensor, eps: float) -> tuple[int, ...]:
    """What :func:`each_row` takes for a norm of dense rows [T, E]."""
    width = weight.shape[0]
    assert residual.shape[1] == width, (residual.shape, weight.shape)
    pointers = (x.data_ptr() for x in (update, residual, weight, normed, residual))
    return (*pointers, *(0 if name == "weight" else 2 * width for name in _NORM_POINTERS), width, float_bits(eps))


def silu_mul(gate_up: Tensor) -> Tensor:
    """As :func:`kernels.reference.silu_mul`, of ``gate_up`` [T, 2F]."""
    return _gated("silu", gate_up) if _is_gated(gate_up) else reference.silu_mul(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """As :func:`kernels.reference.gelu_mul`, of ``gate_up`` [T, 2F]."""
    return _gated("gelu_tanh", gate_up) if _is_gated(gate_up) else reference.gelu_mul(gate_up)


def _is_gated(gate_up: Tensor) -> bool:
    return is_supported(gate_up) and gate_up.shape[1] % (2 * LANES) == 0


def _gated(activation: str, gate_up: Tensor) -> Tensor:
    output = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _run(gated_name(activation), gate_up, gated_fields(gate_up, output))
    return output


def gated_name(activation: str) -> str:
    """The function for an activation, ``silu`` or ``gelu_tanh``."""
    return f"{activation}_mul"


def gated_fields(gate_up: Tensor, output: Tensor) -> tuple[int, ...]:
    """What :func:`each_row` takes for an activation of dense rows [T, 2F], to [T, F]."""
    width = output.shape[1]
    return gate_up.data_ptr(), output.data_ptr(), 4 * width, 2 * width, width


def float_bits(value: float) -> int:
    """A float32 as it is passed in 64 bits."""
    return int.from_bytes(struct.pack("<f", value), "little")


def _run(name: str, rows: Tensor, fields: tuple[int, ...]) -> None:
    """Calls a function for each of ``rows`` [T, ...]."""
    if not len(rows):
        return
    ticket = torch.zeros(1, dtype=torch.int64)
    num_threads = min(torch.get_num_threads(), len(rows)) if rows.numel() >= _SHARED_FROM else 1
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
        fields: its pointers, their strides in bytes, and scalars, as :func:`kernels.cpu.rows.rows_ir.work` orders them.
    """
    unit = num_rows if size < _SHARED_FROM else -(-num_rows // (num_threads * _TICKETS_PER_THREAD))
    job = (ticket, num_rows, unit, *fields)
    return _compiled()[f"{name}_work"], struct.pack(f"={len(job)}q", *job)


@cache
def _compiled() -> dict[str, int]:
    """Where the code is, by name."""
    pointers = [(name, f"{name}_stride") for name in _NORM_POINTERS]
    scalars = [("i64", "width"), ("float", "eps")]
    parts, names = [HEADER], []
    for adds, wide in product((False, True), (False, True)):
        name = ("add_norm" if adds else "norm") + ("_wide" if wide else "")
        parts += [norm(name, adds=adds, wide=wide), work(name, pointers, scalars)]
        names.append(f"{name}_work")
    for activation in ACTIVATIONS:
        name = gated_name(activation)
        arguments = [("gate_up", "gate_up_stride"), ("output", "output_stride")]
        parts += [gated_row(name, activation), work(name, arguments, scalars[:1])]
        names.append(f"{name}_work")
    return machine_code.addresses("".join(parts), names)
