"""Attention over a paged KV cache: the kernels on the device. The tables are those of :mod:`kernels.cuda.plan`.

Exponentials have base 2, and ``scale`` includes the factor log2(e). A row of a tile is one query of one head.

Shapes: M rows of a tile, N tokens of a tile, D head dimension.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_kv_heads"])
def decode_kernel(
    query, keys, values, slots, counts, tasks, output, partials, masses,
    row_stride, head_stride, num_slots, num_kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Computes parts of decodes for each KV head, into ``output`` or as partial results with the masses' logarithms.

    Grid: any number of programs; program p takes every pair (part, KV head) whose number is p modulo the grid.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    inside = (rows < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    num_pairs, num_heads = tl.load(counts) * num_kv_heads, num_kv_heads * GROUP
    pair = tl.program_id(0)
    while pair < num_pairs:
        task, kv_head = tasks + pair // num_kv_heads * 8, pair % num_kv_heads
        row, first_slot = tl.load(task).to(tl.int64), tl.load(task + 1)
        begin, end, partial = tl.load(task + 2), tl.load(task + 3), tl.load(task + 4).to(tl.int64)
        heads = kv_head * GROUP + rows
        at = query + row * row_stride + heads[:, None] * head_stride + columns[None, :]
        rotated = tl.load(at, mask=inside, other=0.0)
        base = kv_head.to(tl.int64) * num_slots * HEAD_DIM
        total, top, mass = empty_softmax(ROWS, BLOCK_DIM)
        total, top, mass = _fold(
            rotated, keys + base, values + base, slots + first_slot, begin, end, rows, total, top, mass, scale,
            HEAD_DIM, BLOCK_DIM, TOKENS, True, False, 0, WIDENS,
        )  # fmt: skip
        mean = total / mass[:, None]
        if partial < 0:
            place = row * num_heads + heads
            out = output + place[:, None] * HEAD_DIM + columns[None, :]
            tl.store(out, mean.to(output.dtype.element_ty), mask=inside)
        else:
            place = partial * num_heads + heads
            tl.store(partials + place[:, None] * HEAD_DIM + columns[None, :], mean, mask=inside)
            tl.store(masses + place, top + tl.log2(mass), mask=rows < GROUP)
        pair += tl.num_programs(0)


@triton.jit(do_not_specialize=["num_kv_heads"])
def shared_kernel(
    query, keys, values, slots, counts, tasks, members, partials, masses,
    row_stride, head_stride, num_slots, num_kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Computes partial results of shared parts for each KV head, for ROWS (decode, head) pairs at once.

    Grid: any number of programs, as for :func:`decode_kernel`. A task's pairs are cut into BLOCKS blocks; neighbouring
    blocks read the same keys and values at about the same time.
    """
    num_items, num_heads = tl.load(counts + 2) * num_kv_heads * BLOCKS, num_kv_heads * GROUP
    columns = tl.arange(0, BLOCK_DIM)[None, :]
    item = tl.program_id(0)
    while item < num_items:
        task, kv_head = tasks + item // (num_kv_heads * BLOCKS) * 8, item // BLOCKS % num_kv_heads
        num_pairs = tl.load(task + 1) * GROUP
        if item % BLOCKS * ROWS < num_pairs:
            pairs = item % BLOCKS * ROWS + tl.arange(0, ROWS)
            member = members + (tl.load(task) + pairs // GROUP) * 2
            row = tl.load(member, mask=pairs < num_pairs, other=0).to(tl.int64)
            partial = tl.load(member + 1, mask=pairs < num_pairs, other=0).to(tl.int64) + tl.load(task + 5)
            head = kv_head * GROUP + pairs % GROUP
            inside = (pairs < num_pairs)[:, None] & (columns < HEAD_DIM)
            rotated = tl.load(
                query + (row * row_stride + head * head_stride)[:, None] + columns, mask=inside, other=0.0
            )
            base = kv_head.to(tl.int64) * num_slots * HEAD_DIM
            total, top, mass = empty_softmax(ROWS, BLOCK_DIM)
            total, top, mass = _fold(
                rotated, keys + base, values + base, slots + tl.load(task + 2), tl.load(task + 3), tl.load(task + 4),
                pairs, total, top, mass, scale, HEAD_DIM, BLOCK_DIM, TOKENS, False, False, 0, WIDENS,
            )  # fmt: skip
            place = partial * num_heads + head
            tl.store(partials + place[:, None] * HEAD_DIM + columns, total / mass[:, None], mask=inside)
            tl.store(masses + place, top + tl.log2(mass), mask=pairs < num_pairs)
        item += tl.num_programs(0)


@triton.jit
def merge_kernel(
    counts, merges, partials, masses, output, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PARTS: tl.constexpr
):
    """Merges the partial results of each decode that has several, PARTS at once. Grid: merges, H."""
    merge, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if merge >= tl.load(counts + 1):
        return
    row = tl.load(merges + merge * 4).to(tl.int64)
    first, num_parts = tl.load(merges + merge * 4 + 1), tl.load(merges + merge * 4 + 2)
    total, _, sum_of_shares = merge_parts(
        partials, masses, first, num_parts, head, num_heads, HEAD_DIM, BLOCK_DIM, PARTS
    )
    columns = tl.arange(0, BLOCK_DIM)
    at = output + (row * num_heads + head) * HEAD_DIM + columns
    tl.store(at, (total / sum_of_shares).to(output.dtype.element_ty), mask=columns < HEAD_DIM)


@triton.jit
def merge_parts(
    partials, masses, first, num_parts, head, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds the partial results from number ``first`` on, weighted by mass relative to the greatest, PARTS at once.

    Returns the sum [D], the greatest mass's logarithm, and the sum of the weights, which is 0 where all masses are.
    """
    columns = tl.arange(0, BLOCK_DIM)
    total, top, sum_of_shares = tl.zeros((BLOCK_DIM,), tl.float32), -float("inf"), 0.0
    for start in range(0, num_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        inside = (parts < num_parts)[:, None] & (columns < HEAD_DIM)[None, :]
        place = (first + parts).to(tl.int64) * num_heads + head
        mass = tl.load(masses + place, mask=parts < num_parts, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(mass, axis=0))
        safe = tl.where(new_top == -float("inf"), 0.0, new_top)  # there may be no mass yet
        share, decay = tl.exp2(mass - safe), tl.exp2(top - safe)
        means = tl.load(partials + place[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
        total = total * decay + tl.sum(share[:, None] * means, axis=0)
        sum_of_shares = sum_of_shares * decay + tl.sum(share, axis=0)
        top = new_top
    return total, top, sum_of_shares


@triton.jit(do_not_specialize=["num_kv_heads"])
def chunk_kernel(
    query, keys, values, slots, tasks, output, row_stride, head_stride, num_slots, num_kv_heads, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Computes blocks of ROWS (query, head) pairs of chunks, each over all tokens that it sees. WINDOW 0 is none.

    Grid: K times the blocks of a task's pairs, tasks. Later blocks come first: they see more tokens.
    """
    kv_head = tl.program_id(0) % num_kv_heads
    first = (tl.num_programs(0) // num_kv_heads - 1 - tl.program_id(0) // num_kv_heads) * ROWS
    task = tasks + tl.program_id(1) * 8
    first_row, num_queries = tl.load(task).to(tl.int64), tl.load(task + 1)
    first_slot, position = tl.load(task + 2), tl.load(task + 3)
    if first >= num_queries * GROUP:
        return
    pairs, columns = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    inside = (pairs < num_queries * GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    row, head = first_row + pairs // GROUP, kv_head * GROUP + pairs % GROUP
    at = query + (row * row_stride + head * head_stride)[:, None] + columns[None, :]
    base = kv_head.to(tl.int64) * num_slots * HEAD_DIM
    total, mass = _attend_block(
        tl.load(at, mask=inside, other=0.0), keys + base, values + base, slots + first_slot,
        position + tl.minimum(pairs // GROUP, num_queries - 1), position + first // GROUP,
        position + tl.minimum(num_queries, tl.cdiv(first + ROWS, GROUP)) - 1,
        scale, HEAD_DIM, BLOCK_DIM, ROWS, TOKENS, WINDOW, WIDENS,
    )  # fmt: skip
    out = output + (row * (num_kv_heads * GROUP) + head)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out, (total / mass[:, None]).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _attend_block(
    rotated, keys, values, slots, own, first_own, last_own, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Computes sum [M, D] and mass [M] of rows whose own tokens ``own`` [M] lie from ``first_own`` to ``last_own``.

    Tiles that every row sees whole need no mask; those at the beginning of the window and at the end do.
    """
    total, top, mass = empty_softmax(ROWS, BLOCK_DIM)
    seen_from = 0  # by every row, as the tokens up to first_own are
    if WINDOW:
        begin = tl.maximum(0, first_own - WINDOW + 1)
        seen_from = begin + tl.cdiv(tl.maximum(0, last_own - WINDOW + 1 - begin), TOKENS) * TOKENS
        seen_from = tl.minimum(seen_from, last_own + 1)
        total, top, mass = _fold(
            rotated, keys, values, slots, begin, seen_from, own, total, top, mass, scale,
            HEAD_DIM, BLOCK_DIM, TOKENS, True, True, WINDOW, WIDENS,
        )  # fmt: skip
    seen_to = seen_from + tl.maximum(0, first_own + 1 - seen_from) // TOKENS * TOKENS
    total, top, mass = _fold(
        rotated, keys, values, slots, seen_from, seen_to, own, total, top, mass, scale,
        HEAD_DIM, BLOCK_DIM, TOKENS, False, False, 0, WIDENS,
    )  # fmt: skip
    total, top, mass = _fold(
        rotated, keys, values, slots, seen_to, last_own + 1, own, total, top, mass, scale,
        HEAD_DIM, BLOCK_DIM, TOKENS, True, True, WINDOW, WIDENS,
    )  # fmt: skip
    return total, mass


@triton.jit
def empty_softmax(ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Returns the running softmax of no tokens: see :func:`_fold`."""
    total = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    return total, top, tl.zeros((ROWS,), tl.float32)


@triton.jit
def _fold(
    rotated, keys, values, slots, begin, end, own, total, top, mass, scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, TOKENS: tl.constexpr,
    RAGGED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Adds the tokens ``begin`` to ``end`` to the running softmax of queries [M, D] (Milakov and Gimelshein 2018).

    ``total`` [M, D] is the weighted sum of values and ``mass`` [M] the sum of the weights, both relative to
    2 ** ``top`` [M]. RAGGED tells that ``end - begin`` may not be whole tiles. CAUSAL tells that a row sees tokens up
    to ``own`` [M], and of them the last WINDOW. Nothing beyond ``end`` is read. Float32 is multiplied as three products
    of TF32, which keeps all but the last bit or two (Ootomo and Yokota 2022); that does not concern bfloat16.
    """
    if WIDENS:
        rotated = rotated.to(tl.float32)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        key, value = load_tile(keys, values, slots, token, end, HEAD_DIM, BLOCK_DIM, RAGGED)
        if WIDENS:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(rotated, tl.trans(key), input_precision="tf32x3") * scale
        if RAGGED:
            visible = (token < end)[None, :]
            if CAUSAL:
                visible = visible & (token[None, :] <= own[:, None])
                if WINDOW:
                    visible = visible & (token[None, :] > own[:, None] - WINDOW)
            scores = tl.where(visible, scores, -float("inf"))
        total, top, mass = add_tokens(scores, value, total, top, mass)
    return total, top, mass


@triton.jit
def add_tokens(scores, value, total, top, mass):
    """Adds a tile's values [N, D] with ``scores`` [M, N] to the running softmax: see :func:`_fold`."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row may have seen nothing yet
    weights = tl.exp2(scores - safe[:, None])
    decay = tl.exp2(top - safe)
    mass = mass * decay + tl.sum(weights, axis=1)
    total = tl.dot(weights.to(value.dtype), value, total * decay[:, None], input_precision="tf32x3")
    return total, new_top, mass


@triton.jit
def load_tile(keys, values, slots, token, end, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, RAGGED: tl.constexpr):
    """Loads the keys and values [N, D] of the tokens ``token`` [N], and zeros for those from ``end`` on."""
    columns = tl.arange(0, BLOCK_DIM)[None, :]
    if RAGGED:
        slot = tl.load(slots + token, mask=token < end, other=0)
        at, inside = slot[:, None] * HEAD_DIM + columns, (token < end)[:, None] & (columns < HEAD_DIM)
        key, value = tl.load(keys + at, mask=inside, other=0.0), tl.load(values + at, mask=inside, other=0.0)
    else:
        at, inside = tl.load(slots + token)[:, None] * HEAD_DIM + columns, columns < HEAD_DIM
        if BLOCK_DIM == HEAD_DIM:
            key, value = tl.load(keys + at), tl.load(values + at)
        else:
            key, value = tl.load(keys + at, mask=inside, other=0.0), tl.load(values + at, mask=inside, other=0.0)
    return key, value
