"""Attention over parts of what queries see: the device's part. The tables are those of :mod:`kernels.cuda.parts_plan`.

Exponentials are of base 2, as in :mod:`kernels.cuda.attention_kernels`; masses are given as natural logarithms.

Shapes: M rows of a tile, N tokens of a tile, D head dimension.
"""

import triton
import triton.language as tl

from kernels.cuda.attention_kernels import _add_tokens, _load, _nothing_yet


@triton.jit(do_not_specialize=["num_kv_heads"])
def part_kernel(
    query, keys, values, slots, queries, tasks, partials, masses,
    row_stride, head_stride, num_slots, num_kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Blocks of ROWS (query, head) pairs against the tokens of a stretch that each sees: partial results.

    Grid: K times the blocks of a task's pairs, tasks.
    """
    kv_head, first = tl.program_id(0) % num_kv_heads, tl.program_id(0) // num_kv_heads * ROWS
    task = tasks + tl.program_id(1) * 8
    first_query, num_queries, first_slot = tl.load(task), tl.load(task + 1), tl.load(task + 2)
    if first >= num_queries * GROUP:
        return
    pairs, columns = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    is_pair = pairs < num_queries * GROUP
    inside = is_pair[:, None] & (columns < HEAD_DIM)[None, :]
    its = queries + (first_query + pairs // GROUP) * 8
    row, head = tl.load(its, mask=is_pair, other=0).to(tl.int64), kv_head * GROUP + pairs % GROUP
    since = tl.maximum(tl.load(its + 1, mask=is_pair, other=0), tl.load(task + 3))
    until = tl.minimum(tl.load(its + 2, mask=is_pair, other=0), tl.load(task + 4))
    partial = tl.load(its + 3, mask=is_pair, other=0).to(tl.int64) + tl.load(task + 5)
    at = query + (row * row_stride + head * head_stride)[:, None] + columns[None, :]
    turned = tl.load(at, mask=inside, other=0.0)
    if WIDENS:
        turned = turned.to(tl.float32)
    base = kv_head.to(tl.int64) * num_slots * HEAD_DIM
    total, top, mass = _nothing_yet(ROWS, BLOCK_DIM)
    # Those that see nothing here begin no search, and end none.
    begin = tl.min(tl.where(since < until, since, 0x7FFFFFFF), axis=0)
    end = tl.max(tl.where(since < until, until, 0), axis=0)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        key, value = _load(keys + base, values + base, slots + first_slot, token, end, HEAD_DIM, BLOCK_DIM, True)
        if WIDENS:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(turned, tl.trans(key), input_precision="tf32x3") * scale
        visible = (token[None, :] >= since[:, None]) & (token[None, :] < until[:, None])
        total, top, mass = _add_tokens(tl.where(visible, scores, -float("inf")), value, total, top, mass)
    seen = mass > 0.0
    mean = total / tl.where(seen, mass, 1.0)[:, None]
    place = partial * (num_kv_heads * GROUP) + head
    tl.store(partials + place[:, None] * HEAD_DIM + columns[None, :], mean, mask=inside)
    tl.store(masses + place, tl.where(seen, top + tl.log2(tl.where(seen, mass, 1.0)), -float("inf")), mask=is_pair)


@triton.jit
def join_kernel(
    queries, partials, masses, output, logs,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Each query's output and the logarithm of its mass from its partial results, PARTS at once. Grid: queries, H."""
    its, head, num_heads = queries + tl.program_id(0) * 8, tl.program_id(1), tl.num_programs(1)
    row, first, num_parts = tl.load(its).to(tl.int64), tl.load(its + 3), tl.load(its + 4)
    columns = tl.arange(0, BLOCK_DIM)
    total, top, sum_of_shares = tl.zeros((BLOCK_DIM,), tl.float32), -float("inf"), 0.0
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        inside = (parts < num_parts)[:, None] & (columns < HEAD_DIM)[None, :]
        place = (first + parts).to(tl.int64) * num_heads + head
        mass = tl.load(masses + place, mask=parts < num_parts, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(mass, axis=0))
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)  # it may have seen nothing yet
        share, decay = tl.exp2(mass - safe), tl.exp2(top - safe)
        means = tl.load(partials + place[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
        total = total * decay + tl.sum(share[:, None] * means, axis=0)
        sum_of_shares = sum_of_shares * decay + tl.sum(share, axis=0)
        top = new_top
    seen = sum_of_shares > 0.0
    whole = tl.where(seen, sum_of_shares, 1.0)
    at = output + (row * num_heads + head) * HEAD_DIM + columns
    tl.store(at, (total / whole).to(output.dtype.element_ty), mask=columns < HEAD_DIM)
    natural = (top + tl.log2(whole)) * 0.6931471805599453
    tl.store(logs + row * num_heads + head, tl.where(seen, natural, -float("inf")))
