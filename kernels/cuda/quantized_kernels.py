"""Products with rounded weights: the kernels on the device. :mod:`kernels.cuda.quantized_tiles` lays the weights out.

Codes are whole numbers, which every input type represents exactly, so tensor cores multiply by them directly. A
block's sums are then scaled in float32. So a weight is never rounded again, and needs no arithmetic but its widening.

Shapes: M outputs of a tile, N tokens of a tile, B inputs of a block.
"""

import triton
import triton.language as tl

# The bits 0x4300 are 128 in bfloat16, and with a small number in their low bits they are 128 plus that number. One
# permutation puts two of four such bytes below these bits, and a subtraction then gives the exact value.
NIBBLES_TO_BF16 = """
{
    .reg .b32 a, b, one, less;
    mov.b32 one, 0x3F803F80;
    mov.b32 less, 0xC308C308;
    and.b32 a, $4, 0x0F0F0F0F;
    shr.b32 b, $4, 4;
    and.b32 b, b, 0x0F0F0F0F;
    prmt.b32 $0, a, 0x43434343, 0x4140;
    prmt.b32 $1, a, 0x43434343, 0x4342;
    prmt.b32 $2, b, 0x43434343, 0x4140;
    prmt.b32 $3, b, 0x43434343, 0x4342;
    fma.rn.bf16x2 $0, $0, one, less;
    fma.rn.bf16x2 $1, $1, one, less;
    fma.rn.bf16x2 $2, $2, one, less;
    fma.rn.bf16x2 $3, $3, one, less;
}
"""
# A byte's lowest seven bits are added to 128, and 128 or 256 is subtracted, depending on its highest bit.
BYTES_TO_BF16 = """
{
    .reg .b32 a, b, c, d, less;
    mov.b32 less, 0xBF80BF80;
    prmt.b32 a, $2, 0x43434343, 0x4140;
    prmt.b32 b, $2, 0x43434343, 0x4342;
    and.b32 c, a, 0xFF80FF80;
    and.b32 d, b, 0xFF80FF80;
    and.b32 a, a, 0xFF7FFF7F;
    and.b32 b, b, 0xFF7FFF7F;
    fma.rn.bf16x2 $0, c, less, a;
    fma.rn.bf16x2 $1, d, less, b;
}
"""
_NIBBLES_TO_BF16, _BYTES_TO_BF16 = tl.constexpr(NIBBLES_TO_BF16), tl.constexpr(BYTES_TO_BF16)


@triton.jit(do_not_specialize=["num_tokens", "num_outputs", "num_blocks", "blocks_per_part"])
def product_kernel(
    x, codes, scales, offsets, bias, output, partials, tickets,
    row_stride, num_tokens, num_outputs, padded, num_blocks, blocks_per_part,
    BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CUT: tl.constexpr, STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Computes ``output`` [num_tokens, num_outputs]. Grid: tiles of tokens (with the same codes), of outputs, parts.

    IS_CUT: the inputs are cut into parts. Each program writes its sums to ``partials`` [parts, num_tokens, padded]; the
    one that takes the last of a tile's tickets adds them, always in the same order, and leaves the tickets at zero.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    begin, padded = tl.program_id(2) * blocks_per_part, padded.to(tl.int64)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    # As an option of the loop, the number of stages covers the loads of scales too, and not only of operands.
    for block in tl.range(begin, tl.minimum(begin + blocks_per_part, num_blocks), num_stages=STAGES):
        sums, inputs = _block_product(
            x + tokens[:, None].to(tl.int64) * row_stride + block * BLOCK, (tokens < num_tokens)[:, None],
            codes, block * padded + rows, BITS, BLOCK, HAS_OFFSETS, INTERPRETED,
        )  # fmt: skip
        factors = block // BLOCKS_PER_GROUP * padded + rows
        total += sums * tl.load(scales + factors)[:, None]
        if HAS_OFFSETS:
            total += tl.load(offsets + factors)[:, None] * inputs[None, :]
    if not IS_CUT:
        _store(output, total, bias, rows, tokens, num_tokens, num_outputs, HAS_BIAS)
    else:
        at = tokens[None, :] * padded + rows[:, None]
        present = (tokens < num_tokens)[None, :]
        part_size = num_tokens * padded
        tl.store(partials + tl.program_id(2) * part_size + at, total, mask=present)
        tl.debug_barrier()  # the ticket is taken for all threads of the program
        ticket = tickets + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(2) - 1:
            total = tl.zeros((ROWS, TOKENS), tl.float32)
            for part in range(tl.num_programs(2)):
                total += tl.load(partials + part * part_size + at, mask=present, other=0.0, cache_modifier=".cg")
            _store(output, total, bias, rows, tokens, num_tokens, num_outputs, HAS_BIAS)
            tl.store(ticket, 0)


@triton.jit
def _block_product(
    x, present, codes, rows, BITS: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Multiplies the codes of a block by its inputs, [M, N], and sums the inputs, [N], where SUMS."""
    HALF: tl.constexpr = BLOCK // 2
    wide = tl.float32 if INTERPRETED else x.dtype.element_ty
    inputs = 0.0
    if BITS == 4:
        columns = tl.arange(0, HALF)[None, :]
        packed = tl.load(codes + rows[:, None] * HALF + columns)
        low, high = _widen_nibbles(packed, wide)
        near = tl.load(x + columns, mask=present, other=0.0).to(wide)
        far = tl.load(x + HALF + columns, mask=present, other=0.0).to(wide)
        sums = tl.dot(low, tl.trans(near), input_precision="tf32x3")
        sums = tl.dot(high, tl.trans(far), sums, input_precision="tf32x3")
        if SUMS:
            inputs = tl.sum(near.to(tl.float32) + far.to(tl.float32), axis=1)
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        weights = _widen_bytes(tl.load(codes + rows[:, None] * BLOCK + columns), wide)
        near = tl.load(x + columns, mask=present, other=0.0).to(wide)
        sums = tl.dot(weights, tl.trans(near), input_precision="tf32x3")
        if SUMS:
            inputs = tl.sum(near.to(tl.float32), axis=1)
    return sums, inputs


@triton.jit
def _widen_nibbles(packed, wide: tl.constexpr):
    """Widens the codes in the low and in the high halves of bytes."""
    if wide == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _NIBBLES_TO_BF16, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = ((packed & 15).to(tl.int8) - 8).to(wide), ((packed >> 4).to(tl.int8) - 8).to(wide)
    return low, high


@triton.jit
def _widen_bytes(codes, wide: tl.constexpr):
    """Widens codes of 8 bits."""
    if wide == tl.bfloat16:
        weights = tl.inline_asm_elementwise(_BYTES_TO_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        weights = codes.to(wide)
    return weights


@triton.jit
def _store(output, total, bias, rows, tokens, num_tokens, num_outputs, HAS_BIAS: tl.constexpr):
    """Adds the bias to sums [M, N], and stores those of real tokens and outputs."""
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < num_outputs, other=0.0).to(tl.float32)[:, None]
    at = output + tokens[None, :].to(tl.int64) * num_outputs + rows[:, None]
    inside = (tokens < num_tokens)[None, :] & (rows < num_outputs)[:, None]
    tl.store(at, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def widen_kernel(
    codes, scales, offsets, weights, padded, first_row, num_inputs,
    BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr, ROWS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Widens the outputs from ``first_row`` on into ``weights`` [rows, num_inputs]. Grid: tiles of rows, blocks."""
    block, own = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = (block * padded + first_row + own)[:, None]
    factors = (block // BLOCKS_PER_GROUP * padded + first_row + own)[:, None]
    scale = tl.load(scales + factors)
    offset = tl.load(offsets + factors) if HAS_OFFSETS else 0.0
    out = weights + own[:, None].to(tl.int64) * num_inputs + block * BLOCK
    narrow = weights.dtype.element_ty
    if BITS == 4:
        columns = tl.arange(0, BLOCK // 2)[None, :]
        low, high = _widen_nibbles(tl.load(codes + rows * (BLOCK // 2) + columns), tl.float32)
        tl.store(out + columns, (low * scale + offset).to(narrow))
        tl.store(out + BLOCK // 2 + columns, (high * scale + offset).to(narrow))
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        wide = tl.load(codes + rows * BLOCK + columns).to(tl.float32)
        tl.store(out + columns, (wide * scale + offset).to(narrow))
