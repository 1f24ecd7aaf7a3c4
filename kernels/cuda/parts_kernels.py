"""Attention over parts of what queries see: the device's part. The tables are those of :mod:`kernels.cuda.parts_plan`.

Exponentials are of base 2, as in :mod:`kernels.cuda.attention_kernels`; the masses of results are natural logarithms.

Shapes: M rows of a tile, N tokens of a tile, D head dimension.
"""

import triton
import triton.language as tl

from kernels.cuda.attention_kernels import add_tokens, load_tile, nothing_yet

_LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_slots", "num_kv_heads"])
def part_kernel(
    query, keys, values, slots, queries, tasks, output, logs, partials, masses,
    row_stride, head_stride, num_slots, num_kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Blocks of ROWS (query, head) pairs against the tokens of a stretch that each sees: results, whole or partial.

    Grid: tasks, K times the blocks of a task's pairs.
    """
    kv_head, first = tl.program_id(1) % num_kv_heads, tl.program_id(1) // num_kv_heads * ROWS
    task = tasks + tl.program_id(0) * 8
    num_pairs = tl.load(task + 1) * GROUP
    if first >= num_pairs:
        return
    pairs, columns = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)[None, :]
    is_pair = pairs < num_pairs
    inside = is_pair[:, None] & (columns < HEAD_DIM)
    its = queries + (tl.load(task) + pairs // GROUP) * 8
    row, head = tl.load(its, mask=is_pair, other=0).to(tl.int64), kv_head * GROUP + pairs % GROUP
    since = tl.maximum(tl.load(its + 1, mask=is_pair, other=0), tl.load(task + 3))
    until = tl.minimum(tl.load(its + 2, mask=is_pair, other=0), tl.load(task + 4))
    turned = tl.load(query + (row * row_stride + head * head_stride)[:, None] + columns, mask=inside, other=0.0)
    base = kv_head.to(tl.int64) * num_slots * HEAD_DIM
    total, top, mass = _attend_seen(
        turned, keys + base, values + base, slots + tl.load(task + 2), since, until, scale,
        HEAD_DIM, BLOCK_DIM, ROWS, TOKENS, WIDENS,
    )  # fmt: skip
    seen, num_heads = mass > 0.0, num_kv_heads * GROUP
    mean = total / tl.where(seen, mass, 1.0)[:, None]
    log = tl.where(seen, top + tl.log2(tl.where(seen, mass, 1.0)), -float("inf"))
    partial = tl.load(its + 3, mask=is_pair, other=0).to(tl.int64)
    is_whole, place = partial < 0, row * num_heads + head
    tl.store(output + place[:, None] * HEAD_DIM + columns, mean.to(output.dtype.element_ty), inside & is_whole[:, None])
    tl.store(logs + place, log * _LOG_2, mask=is_pair & is_whole)
    place = (partial + tl.load(task + 5)) * num_heads + head
    tl.store(partials + place[:, None] * HEAD_DIM + columns, mean, mask=inside & (partial >= 0)[:, None])
    tl.store(masses + place, log, mask=is_pair & (partial >= 0))


@triton.jit
def _attend_seen(
    turned, keys, values, slots, since, until, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Running softmax of rows [M] that see tokens ``since`` [M] to ``until`` [M]; some may see none."""
    if WIDENS:
        turned = turned.to(tl.float32)
    total, top, mass = nothing_yet(ROWS, BLOCK_DIM)
    # Rows that see nothing set neither edge.
    begin = tl.min(tl.where(since < until, since, 0x7FFFFFFF), axis=0)
    end = tl.max(tl.where(since < until, until, 0), axis=0)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        key, value = load_tile(keys, values, slots, token, end, HEAD_DIM, BLOCK_DIM, True)
        if WIDENS:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(turned, tl.trans(key), input_precision="tf32x3") * scale
        visible = (token[None, :] >= since[:, None]) & (token[None, :] < until[:, None])
        total, top, mass = add_tokens(tl.where(visible, scores, -float("inf")), value, total, top, mass)
    return total, top, mass


@triton.jit
def join_kernel(
    joins, queries, partials, masses, output, logs,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Results of queries that have partial ones, weighted by mass, PARTS at once. Grid: joins, H."""
    its = queries + tl.load(joins + tl.program_id(0)) * 8
    head, num_heads = tl.program_id(1), tl.num_programs(1)
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
    tl.store(logs + row * num_heads + head, tl.where(seen, (top + tl.log2(whole)) * _LOG_2, -float("inf")))
