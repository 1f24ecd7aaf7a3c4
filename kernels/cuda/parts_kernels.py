"""Attention to parts of what queries see: the kernels on the device. :mod:`kernels.cuda.parts_plan` makes the tables.

Exponentials have base 2, as in :mod:`kernels.cuda.attention_kernels`; the results' masses are natural logarithms.

Shapes: M rows of a tile, N tokens of a tile, D head dimension.
"""

import triton
import triton.language as tl

from kernels.cuda.attention_kernels import add_tokens, empty_softmax, load_tile, merge_parts

_LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_slots", "num_kv_heads"])
def part_kernel(
    query, keys, values, slots, queries, tasks, output, logs, partials, masses,
    row_stride, head_stride, num_slots, num_kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Computes blocks of ROWS (query, head) pairs over the tokens of a segment: results, whole or partial.

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
    entry = queries + (tl.load(task) + pairs // GROUP) * 8
    row, head = tl.load(entry, mask=is_pair, other=0).to(tl.int64), kv_head * GROUP + pairs % GROUP
    since = tl.maximum(tl.load(entry + 1, mask=is_pair, other=0), tl.load(task + 3))
    until = tl.minimum(tl.load(entry + 2, mask=is_pair, other=0), tl.load(task + 4))
    rotated = tl.load(query + (row * row_stride + head * head_stride)[:, None] + columns, mask=inside, other=0.0)
    base = kv_head.to(tl.int64) * num_slots * HEAD_DIM
    total, top, mass = _attend_seen(
        rotated, keys + base, values + base, slots + tl.load(task + 2), since, until, scale,
        HEAD_DIM, BLOCK_DIM, ROWS, TOKENS, WIDENS,
    )  # fmt: skip
    seen, num_heads = mass > 0.0, num_kv_heads * GROUP
    mean = total / tl.where(seen, mass, 1.0)[:, None]
    log = tl.where(seen, top + tl.log2(tl.where(seen, mass, 1.0)), -float("inf"))
    partial = tl.load(entry + 3, mask=is_pair, other=0).to(tl.int64)
    is_whole, place = partial < 0, row * num_heads + head
    tl.store(output + place[:, None] * HEAD_DIM + columns, mean.to(output.dtype.element_ty), inside & is_whole[:, None])
    tl.store(logs + place, log * _LOG_2, mask=is_pair & is_whole)
    place = (partial + tl.load(task + 5)) * num_heads + head
    tl.store(partials + place[:, None] * HEAD_DIM + columns, mean, mask=inside & (partial >= 0)[:, None])
    tl.store(masses + place, log, mask=is_pair & (partial >= 0))


@triton.jit
def _attend_seen(
    rotated, keys, values, slots, since, until, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Computes the running softmax of rows [M] that see tokens ``since`` [M] to ``until`` [M]; some may see none."""
    if WIDENS:
        rotated = rotated.to(tl.float32)
    total, top, mass = empty_softmax(ROWS, BLOCK_DIM)
    # Rows that see nothing set neither end.
    begin = tl.min(tl.where(since < until, since, 0x7FFFFFFF), axis=0)
    end = tl.max(tl.where(since < until, until, 0), axis=0)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        key, value = load_tile(keys, values, slots, token, end, HEAD_DIM, BLOCK_DIM, True)
        if WIDENS:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(rotated, tl.trans(key), input_precision="tf32x3") * scale
        visible = (token[None, :] >= since[:, None]) & (token[None, :] < until[:, None])
        total, top, mass = add_tokens(tl.where(visible, scores, -float("inf")), value, total, top, mass)
    return total, top, mass


@triton.jit
def join_kernel(
    joins, queries, partials, masses, output, logs,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merges the partial results of each query that has several, PARTS at once. Grid: joins, H."""
    entry = queries + tl.load(joins + tl.program_id(0)) * 8
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    row, first, num_parts = tl.load(entry).to(tl.int64), tl.load(entry + 3), tl.load(entry + 4)
    total, top, sum_of_shares = merge_parts(
        partials, masses, first, num_parts, head, num_heads, HEAD_DIM, BLOCK_DIM, PARTS
    )
    columns = tl.arange(0, BLOCK_DIM)
    seen = sum_of_shares > 0.0
    whole = tl.where(seen, sum_of_shares, 1.0)
    at = output + (row * num_heads + head) * HEAD_DIM + columns
    tl.store(at, (total / whole).to(output.dtype.element_ty), mask=columns < HEAD_DIM)
    tl.store(logs + row * num_heads + head, tl.where(seen, (top + tl.log2(whole)) * _LOG_2, -float("inf")))
