"""The rotary embedding, and storing new keys and values in the cache.

Shapes: T tokens, N heads (queries' and keys'), K KV heads, S slots, D head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention import LayerCache

_HEADS = 8  # the heads of a token in one program: more programs hide the latency of a small batch


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Implements :func:`kernels.reference.rotate`. The numbers of a head must be dense; so is the result."""
    num_tokens, num_heads, head_dim = x.shape
    assert x.stride(2) == 1 and cos.is_contiguous() and sin.is_contiguous() and head_dim % 2 == 0
    assert cos.shape == sin.shape == (num_tokens, 1, head_dim) and cos.dtype == sin.dtype == x.dtype
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        half = head_dim // 2
        with torch.cuda.device_of(x):
            _rotate_kernel[(num_tokens, triton.cdiv(num_heads, _HEADS))](
                x, cos, sin, rotated, num_heads, x.stride(0), x.stride(1), half, triton.next_power_of_2(half), _HEADS
            )
    return rotated


def write_kv(cache: LayerCache, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Implements :func:`kernels.reference.write_kv`; a token whose slot is -1 is not stored."""
    num_kv_heads, num_slots, head_dim = cache.keys.shape
    assert cache.keys.is_contiguous() and cache.values.is_contiguous()
    assert keys.stride(2) == values.stride(2) == 1 and keys.dtype == values.dtype == cache.keys.dtype
    strides = keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)
    blocks = triton.next_power_of_2(num_kv_heads), triton.next_power_of_2(head_dim)
    if len(slots):
        with torch.cuda.device_of(slots):
            _write_kernel[(len(slots),)](
                keys, values, cache.keys, cache.values, slots, num_slots, *strides, num_kv_heads, head_dim, *blocks
            )


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    rotated,
    num_heads,
    token_stride,
    head_stride,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Computes ``rotated`` [T, num_heads, 2 * HALF]. Grid: T, blocks of HEADS heads."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, BLOCK)
    paired = columns < HALF
    inside = (heads < num_heads)[:, None] & paired[None, :]
    at = x + token * token_stride + heads[:, None] * head_stride + columns[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    table = token * 2 * HALF + columns
    low_cos = tl.load(cos + table, mask=paired, other=0.0).to(tl.float32)[None, :]
    high_cos = tl.load(cos + table + HALF, mask=paired, other=0.0).to(tl.float32)[None, :]
    low_sin = tl.load(sin + table, mask=paired, other=0.0).to(tl.float32)[None, :]
    high_sin = tl.load(sin + table + HALF, mask=paired, other=0.0).to(tl.float32)[None, :]
    out = rotated + (token * num_heads + heads[:, None]) * 2 * HALF + columns[None, :]
    narrow = rotated.dtype.element_ty
    # Each product is rounded, as in the reference.
    new_low = (low * low_cos).to(narrow).to(tl.float32) + (high * low_sin).to(narrow).to(tl.float32)
    new_high = (high * high_cos).to(narrow).to(tl.float32) + (low * high_sin).to(narrow).to(tl.float32)
    tl.store(out, new_low.to(narrow), mask=inside)
    tl.store(out + HALF, new_high.to(narrow), mask=inside)


@triton.jit
def _write_kernel(
    keys,
    values,
    key_cache,
    value_cache,
    slots,
    num_slots,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Stores each token at slot ``slots[t]`` of the caches [NUM_HEADS, num_slots, HEAD_DIM]. Grid: T."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_DIM)[None, :]
    inside = (heads < NUM_HEADS) & (columns < HEAD_DIM)
    key = tl.load(keys + token * key_token_stride + heads * key_head_stride + columns, mask=inside)
    value = tl.load(values + token * value_token_stride + heads * value_head_stride + columns, mask=inside)
    at = (heads.to(tl.int64) * num_slots + slot) * HEAD_DIM + columns
    tl.store(key_cache + at, key, mask=inside)
    tl.store(value_cache + at, value, mask=inside)
