"""Gated activations in one pass over memory, which round where :mod:`kernels.reference` rounds.

Shapes: T tokens, F feed-forward size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """Implements :func:`kernels.reference.silu_mul`; the numbers of a row must be dense."""
    return _gated(gate_up, gelu=False)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Implements :func:`kernels.reference.gelu_mul`; the numbers of a row must be dense."""
    return _gated(gate_up, gelu=True)


def _gated(gate_up: Tensor, *, gelu: bool) -> Tensor:
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape == (num_tokens, 2 * width) and gate_up.stride(1) == 1
    output = gate_up.new_empty(num_tokens, width)
    if num_tokens:
        with torch.cuda.device_of(gate_up):
            _gated_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](
                gate_up, output, gate_up.stride(0), width, _BLOCK, gelu
            )
    return output


@triton.jit
def _gated_kernel(gate_up, output, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """Computes ``output`` [T, WIDTH]. Grid: T, blocks of columns."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(gate_up + token * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * row_stride + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    # GELU's (1 + tanh(z)) / 2 is the logistic function of 2z: sqrt(2 / pi) * (x + 0.044715 x^3), doubled.
    slope = gate * (1.5957691216057308 + 0.07135481282553 * gate * gate) if GELU else gate
    active = (gate / (1.0 + tl.exp(-slope))).to(output.dtype.element_ty)
    product = active.to(tl.float32) * up
    tl.store(output + token * WIDTH + columns, product.to(output.dtype.element_ty), mask=inside)
