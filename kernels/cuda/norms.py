"""RMSNorm, also of a sum with the residual, in one pass over memory; rounds where :mod:`kernels.reference` rounds.

Shapes: T tokens, N heads, W numbers that are normed together: the hidden size E or the head dimension D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # the fewest numbers of a program, so that narrow rows share one


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Implements :func:`kernels.reference.rms_norm`. The numbers of a row must be dense; so is the result."""
    heads = x[:, None] if x.dim() == 2 else x  # [T, N, W]
    num_tokens, num_heads, width = heads.shape
    assert heads.stride(2) == 1 and weight.is_contiguous() and weight.shape[-1] == width
    assert weight.dim() == 1 or weight.shape == (num_heads, width)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows = num_tokens * num_heads
    if num_rows:
        block, rows, num_warps = _tile(width)
        strides = heads.stride(0), heads.stride(1), 0 if weight.dim() == 1 else width
        with torch.cuda.device_of(x):
            _norm_kernel[(triton.cdiv(num_rows, rows),)](
                heads, weight, normed, num_rows, num_heads, *strides, eps, width, block, rows, num_warps=num_warps
            )
    return normed


def add_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Implements :func:`kernels.reference.add_rms_norm` for dense tensors; writes the sum over ``residual``."""
    num_rows, width = residual.shape
    assert update.shape == residual.shape and weight.shape == (width,) and update.dtype == residual.dtype
    assert update.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()
    normed = torch.empty_like(residual)
    if num_rows:
        block, rows, num_warps = _tile(width)
        with torch.cuda.device_of(residual):
            _add_norm_kernel[(triton.cdiv(num_rows, rows),)](
                update, residual, weight, normed, num_rows, eps, width, block, rows, num_warps=num_warps
            )
    return normed, residual


def _tile(width: int) -> tuple[int, int, int]:
    """Returns the numbers of a row, and the rows and warps of a program: at most 16 numbers a thread up to 8192."""
    block = triton.next_power_of_2(width)
    rows = max(1, _BLOCK // block)
    return block, rows, min(16, max(4, block * rows // 512))


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x,
    weight,
    normed,
    num_rows,
    num_heads,
    token_stride,
    head_stride,
    weight_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Computes ``normed`` [num_rows, WIDTH], whose rows are ``token * num_heads + head``. Grid: blocks of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)
    token, head = rows // num_heads, rows % num_heads
    starts = token.to(tl.int64) * token_stride + head * head_stride
    wide = tl.load(x + starts[:, None] + columns, mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + head[:, None] * weight_stride + columns, mask=inside, other=0.0)
    _store_normed(normed, wide, weights, rows, columns, inside, eps, WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm_kernel(
    update, residual, weight, normed, num_rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Writes the sum to ``residual`` [num_rows, WIDTH] and its norm to ``normed``. Grid: blocks of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)
    at = rows.to(tl.int64)[:, None] * WIDTH + columns
    added = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    kept = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    total = (kept + added).to(residual.dtype.element_ty)
    tl.store(residual + at, total, mask=inside)
    weights = tl.load(weight + columns, mask=columns < WIDTH, other=0.0)
    _store_normed(normed, total.to(tl.float32), weights, rows, columns, inside, eps, WIDTH)


@triton.jit
def _store_normed(normed, wide, weights, rows, columns, inside, eps, WIDTH: tl.constexpr):
    """Norms ``wide`` [ROWS, BLOCK], zero outside, rounds to the weights' type, multiplies, and rounds again."""
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)
    narrow = (wide * scale[:, None]).to(weights.dtype)
    product = (weights.to(tl.float32) * narrow.to(tl.float32)).to(weights.dtype)
    at = rows.to(tl.int64)[:, None] * WIDTH + columns
    tl.store(normed + at, product.to(normed.dtype.element_ty), mask=inside)
