"""Norms and gated activations of bfloat16 rows, each in one pass over memory: see :mod:`kernels.cpu.rows.rows_ir`.

As separate operations of torch, a norm reads or writes a long prompt's activations eight times, which costs a tenth of
its prefill.

Shapes: T tokens of a batch, E hidden size, F feed-forward size.
"""

import struct
from functools import cache

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.machine import machine_code, threads
from kernels.cpu.machine.target import Target, chosen
from kernels.cpu.machine.threads import Operation
from kernels.cpu.rows.rows_ir import HEADER, LANES, each_row_function, gated_row, norm

# Below this many numbers one thread is done before a second has begun.
_SHARED_FROM = 1 << 15
_TICKETS_PER_THREAD = 4
ACTIVATIONS = ("silu", "gelu_tanh")
_NORM_POINTERS = ("update", "residual", "weight", "normed", "total")
# The function of each norm: whether it adds two rows first, and whether its weight is float32.
_NORMS = {"norm": (False, False), "norm_wide": (False, True), "add_norm": (True, False), "add_norm_wide": (True, True)}


def is_supported(*tensors: Tensor) -> bool:
    """Tells whether all are dense rows of bfloat16 in whole vectors.

    Where they are not, the functions of this module run those of :mod:`kernels.reference`.
    """
    return all(x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[-1] % LANES == 0 for x in tensors)


def is_norm_supported(weight: Tensor) -> bool:
    """Tells whether there is code for a norm's weight."""
    return weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes :func:`kernels.reference.rms_norm` of ``x`` [T, E] and ``weight`` [E]."""
    if x.dim() != 2 or not (is_supported(x) and is_norm_supported(weight)):
        return reference.rms_norm(x, weight, eps)
    normed = torch.empty_like(x)
    _run(norm_name(weight, adds=False), x, norm_fields(x, x, weight, normed, eps))
    return normed


def add_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes :func:`kernels.reference.add_rms_norm`, and writes the sum over ``residual``."""
    if not (is_supported(update, residual) and is_norm_supported(weight)):
        return reference.add_rms_norm(update, residual, weight, eps)
    assert update.shape == residual.shape, (update.shape, residual.shape)
    normed = torch.empty_like(residual)
    _run(norm_name(weight, adds=True), residual, norm_fields(update, residual, weight, normed, eps))
    return normed, residual


def norm_name(weight: Tensor, *, adds: bool) -> str:
    """Returns the name of the function for a norm with this weight; with ``adds``, that of a sum, which is kept."""
    return ("add_norm" if adds else "norm") + ("_wide" if weight.dtype == torch.float32 else "")


def norm_fields(update: Tensor, residual: Tensor, weight: Tensor, normed: Tensor, eps: float) -> tuple[int, ...]:
    """Returns the fields of :func:`each_row` for a norm of dense rows [T, E]."""
    width = weight.shape[0]
    assert residual.shape[1] == width, (residual.shape, weight.shape)
    pointers = (x.data_ptr() for x in (update, residual, weight, normed, residual))
    return (*pointers, *(0 if name == "weight" else 2 * width for name in _NORM_POINTERS), width, float_bits(eps))


def silu_mul(gate_up: Tensor) -> Tensor:
    """Computes :func:`kernels.reference.silu_mul` of ``gate_up`` [T, 2F]."""
    return _gated("silu", gate_up) if _is_gated(gate_up) else reference.silu_mul(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Computes :func:`kernels.reference.gelu_mul` of ``gate_up`` [T, 2F]."""
    return _gated("gelu_tanh", gate_up) if _is_gated(gate_up) else reference.gelu_mul(gate_up)


def _is_gated(gate_up: Tensor) -> bool:
    return is_supported(gate_up) and gate_up.shape[1] % (2 * LANES) == 0


def _gated(activation: str, gate_up: Tensor) -> Tensor:
    output = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _run(gated_name(activation), gate_up, gated_fields(gate_up, output))
    return output


def gated_name(activation: str) -> str:
    """Returns the name of the function for an activation, ``silu`` or ``gelu_tanh``."""
    return f"{activation}_mul"


def gated_fields(gate_up: Tensor, output: Tensor) -> tuple[int, ...]:
    """Returns the fields of :func:`each_row` for a gated activation of dense rows, from [T, 2F] to [T, F]."""
    width = output.shape[1]
    return gate_up.data_ptr(), output.data_ptr(), 4 * width, 2 * width, width


def float_bits(value: float) -> int:
    """Returns the bits of a float32, as it is passed in 64-bit arguments."""
    return int.from_bytes(struct.pack("<f", value), "little")


def _run(name: str, rows: Tensor, fields: tuple[int, ...]) -> None:
    """Calls a compiled function for each of ``rows`` [T, ...]."""
    if not len(rows):
        return
    ticket = torch.zeros(1, dtype=torch.int64)
    num_threads = min(torch.get_num_threads(), len(rows)) if rows.numel() >= _SHARED_FROM else 1
    threads.run(*each_row(name, len(rows), rows.numel(), num_threads, ticket.data_ptr(), fields), num_threads)


def each_row(name: str, num_rows: int, size: int, num_threads: int, ticket: int, fields: tuple[int, ...]) -> Operation:
    """Makes the operation that calls a function for each of ``num_rows`` rows.

    Args:
        name: the function's name, see :func:`_compiled`.
        size: the numbers in all rows; where they are few, one thread takes all rows.
        num_threads: how many threads share the rows.
        ticket: the address of a zero.
        fields: the function's pointers, their strides in bytes, and its scalars, in the order of
            :func:`kernels.cpu.rows.rows_ir.each_row_function`.
    """
    unit = num_rows if size < _SHARED_FROM else -(-num_rows // (num_threads * _TICKETS_PER_THREAD))
    arguments = (ticket, num_rows, unit, *fields)
    return _compiled()[f"{name}_rows"], struct.pack(f"={len(arguments)}q", *arguments)


@cache
def _compiled() -> dict[str, int]:
    """Compiles the functions and returns their addresses by name."""
    names = [f"{name}_rows" for name in (*_NORMS, *map(gated_name, ACTIVATIONS))]
    return machine_code.addresses(module(chosen()), names)


def module(target: Target) -> str:
    """Returns the LLVM IR of all functions."""
    pointers = [(name, f"{name}_stride") for name in _NORM_POINTERS]
    scalars = [("i64", "width"), ("float", "eps")]
    parts = [HEADER]
    for name, (adds, wide) in _NORMS.items():
        parts += [norm(target, name, adds=adds, wide=wide), each_row_function(name, pointers, scalars)]
    for activation in ACTIVATIONS:
        name = gated_name(activation)
        arguments = [("gate_up", "gate_up_stride"), ("output", "output_stride")]
        parts += [gated_row(target, name, activation), each_row_function(name, arguments, scalars[:1])]
    return "".join(parts)
