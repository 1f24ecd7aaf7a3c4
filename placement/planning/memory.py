"""Reckons how many bytes KV blocks, the workspace of a step, and a whole rank take. Owns how sizes are written.

    E  hidden size            H  query heads, K  KV heads
    F  feed-forward size      D  head dimension
    V  vocabulary

F, H and K are those of the rank's part.
"""

import math
from dataclasses import dataclass

from placement.model.part import Part, kept_states
from placement.model.quantization import LinearFormat, loaded_bytes
from placement.model.specs import DType, ModelSpec
from placement.model.striping import WHOLE_TOKENS, Stripe
from placement.model.weights import shard_tensors
from placement.planning.limits import ReplicaLimits

CPU_PROCESS_BYTES = 384 * 2**20
"""The memory of a worker process before it loads anything: Python, torch, gRPC (270 MiB measured), allocator slack."""
SCORED_ROWS = 32
"""The positions of a prompt that are scored at once."""
SAMPLED_ON_CPU, SAMPLED_ON_GPU = 1 << 19, 1 << 23
"""The logits that sampling works on at once, so that its data stay in a CPU's caches, or keep a GPU busy."""
MOST_GRAPHED = 256
"""The decodes of the largest CUDA graph."""
WIDENED_BYTES = 128 * 2**20
"""The bytes of a rounded weight that a GPU widens at once (kernels.linear)."""
CUDA_PROCESS_BYTES = 640 * 2**20
"""The memory that a CUDA context, its libraries and the caching allocator's slack take of a GPU."""

_SAMPLING_CHUNK, _SORTED = 256, 1024
_GRAPHED_TOKENS = 1 << 21
_PART = 256
# For graphs: cuBLAS's workspace for their stream (32 MiB), the driver's copies of their nodes, the pool's rounding.
_GRAPH_SLACK_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The bytes that one rank needs on its device."""

    weight_bytes: int
    kv_bytes: int
    workspace_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        """Adds all of it up."""
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes + self.process_bytes

    def __str__(self) -> str:
        parts = {
            "weights": self.weight_bytes,
            "KV blocks": self.kv_bytes,
            "workspace": self.workspace_bytes,
            "process": self.process_bytes,
        }
        return " + ".join(f"{format_bytes(size)} {name}" for name, size in parts.items() if size)


def footprint(
    model: ModelSpec,
    part: Part,
    *,
    dtype: DType,
    kv_bytes: int,
    limits: ReplicaLimits,
    on_cpu: bool,
    linear: LinearFormat | None = None,
    num_ranks: int = 1,
    leads: bool = True,
) -> Footprint:
    """Reckons the bytes that a rank needs with KV blocks of ``kv_bytes``.

    Args:
        limits: the sizes that its replica serves within.
        linear: the format of its linear layers.
        num_ranks: the number of ranks of its stage.
        leads: whether it is the leader, which samples.
    """
    workspace = workspace_bytes(
        model,
        part,
        dtype=dtype,
        max_num_seqs=limits.max_num_seqs,
        token_budget=limits.token_budget,
        on_cpu=on_cpu,
        num_ranks=num_ranks,
        leads=leads,
    )
    if not on_cpu and part == Part.whole(model):  # steps of several ranks are not recorded
        workspace += graph_bytes(model, dtype=dtype, max_num_seqs=limits.max_num_seqs)
    if not on_cpu and linear is not None:
        workspace += 2 * WIDENED_BYTES  # of a step, and in the graphs
    return Footprint(
        weight_bytes=_weight_bytes(model, part, dtype, linear, on_cpu=on_cpu),
        kv_bytes=kv_bytes,
        workspace_bytes=workspace,
        process_bytes=CPU_PROCESS_BYTES if on_cpu else CUDA_PROCESS_BYTES,
    )


def _weight_bytes(model: ModelSpec, part: Part, dtype: DType, linear: LinearFormat | None, *, on_cpu: bool) -> int:
    """Counts the bytes of a rank's weights as they are held on its device."""
    has_plain_head = linear is None or linear.head_bits is None
    head_bytes = _packed_head_bytes(model, part, dtype) if on_cpu and has_plain_head else 0
    return loaded_bytes(shard_tensors(model, part), dtype, linear) + head_bytes


def _packed_head_bytes(model: ModelSpec, part: Part, dtype: DType) -> int:
    """Counts what a tied head takes beside the embedding: packed for the product, it is no longer a table of rows.

    Only bfloat16 is packed (kernels.linear).
    """
    if dtype is not DType.BFLOAT16 or not model.tied_embeddings:
        return 0
    return len(part.vocab_rows) * model.hidden_size * dtype.itemsize


def kv_bytes_per_block(model: ModelSpec, part: Part, *, dtype: DType, block_size: int) -> int:
    """Counts the bytes of one block on a rank: what its layers keep of each of the block's slots that it holds."""
    num_slots = block_size if part.stripe is None else part.stripe.width
    states = kept_states(model, part.layers, part.kv_heads)
    return num_slots * dtype.itemsize * sum(state.elements_per_token for state in states)


def num_blocks_for(kv_cache_bytes: int, *, bytes_per_block: int) -> int:
    """Counts the whole blocks that fit in ``kv_cache_bytes``."""
    return kv_cache_bytes // bytes_per_block


def num_blocks_of(num_tokens: int, *, block_size: int) -> int:
    """Counts the blocks that a sequence of ``num_tokens`` takes."""
    return -(-num_tokens // block_size)


def workspace_bytes(
    model: ModelSpec,
    part: Part,
    *,
    dtype: DType,
    max_num_seqs: int,
    token_budget: int,
    on_cpu: bool = True,
    num_ranks: int = 1,
    leads: bool = True,
) -> int:
    """Estimates the most bytes that one step allocates at once, without attention's partial results.

    It adds up:

    - for every token of the budget, :func:`_token_bytes`, and what each other rank sends of it (E), with a float32 sum
      where there are three ranks or more. A rank with a stripe computes :func:`most_own_tokens` of the budget instead,
      and exchanges :func:`exchange_bytes`;
    - for every sequence, or for the rows of a prompt that are scored at once, a row of logits in ``dtype``. A rank has
      the columns of its part; the leader of a cut vocabulary has all of them, once as they arrive and once side by
      side;
    - at the leader, :func:`sampling_bytes`.
    """
    rows = max(max_num_seqs, SCORED_ROWS)
    is_cut = len(part.vocab_rows) < model.vocab_size
    width = 2 * model.vocab_size if leads and is_cut else len(part.vocab_rows)
    sampling = sampling_bytes(rows, model.vocab_size, on_cpu=on_cpu) if leads else 0
    rest = rows * width * dtype.itemsize + sampling
    if part.stripe is not None:
        num_own = most_own_tokens(part.stripe, max_num_seqs=max_num_seqs, token_budget=token_budget)
        exchanged = exchange_bytes(
            model, part.stripe, dtype, num_ranks=num_ranks, num_own=num_own, token_budget=token_budget
        )
        return num_own * _token_bytes(model, part, dtype) + exchanged + rest
    sums = (num_ranks - 1) * dtype.itemsize + (4 if num_ranks > 2 else 0)
    return token_budget * (_token_bytes(model, part, dtype) + model.hidden_size * sums) + rest


def most_own_tokens(stripe: Stripe, *, max_num_seqs: int, token_budget: int) -> int:
    """Counts the most tokens of a step that a rank with a stripe computes.

    They are its share of the budget, and for the ends of every sequence up to as many as it has slots of a block, or
    the whole of a chunk that all ranks compute.
    """
    most_ends = max_num_seqs * max(WHOLE_TOKENS, stripe.width)
    return min(token_budget, math.ceil(stripe.share * token_budget) + most_ends)


def exchange_bytes(
    model: ModelSpec, stripe: Stripe, dtype: DType, *, num_ranks: int, num_own: int, token_budget: int
) -> int:
    """Counts the bytes that a rank that shares sequences allocates for the exchange of a layer.

    Where queries move, they are those of all other ranks, and this rank's answers. Where KV moves, it takes no more
    than that, since :func:`most_kv_tokens` limits it. A rank's part for itself is copied; its KV is copied twice. The
    answers of every rank to its own ``num_own`` queries come on top, with the float32 buffers that merge them.
    """
    width = model.num_heads * model.head_dim
    moved = token_budget * 2 * width * dtype.itemsize
    parts = num_own * width * (num_ranks * dtype.itemsize + 3 * 4)
    return math.ceil(moved * (1 + stripe.share)) + parts


def most_kv_tokens(model: ModelSpec, token_budget: int) -> int:
    """Counts the tokens whose KV ranks may exchange in one layer.

    That KV takes as many bytes as the queries of the budget and their answers.
    """
    return token_budget * model.queries_per_kv_head


def _token_bytes(model: ModelSpec, part: Part, dtype: DType) -> int:
    """Counts the bytes of a step for each token, all in ``dtype``:

    5 E         embedding, residual, its normed copy, output of an attention or feed-forward, result
    E           one more such output, in a ladder-residual model
    (H + 2K) D  queries, keys and values
    2 H D       rotated queries, and output of attention
    3 F         gate, up, and their product
    2 max(E, H D, F)  input of a product, in tiles; twice, since some CPUs hold it in float32
    """
    num_kv_heads, ffn_size = len(part.kv_heads), len(part.ffn_columns)
    attention = (3 * model.queries_per_kv_head + 2) * num_kv_heads * model.head_dim
    attended = model.queries_per_kv_head * num_kv_heads * model.head_dim
    tiles = 2 * max(model.hidden_size, attended, ffn_size)
    return ((6 if model.ladder else 5) * model.hidden_size + attention + 3 * ffn_size + tiles) * dtype.itemsize


def sampling_bytes(num_rows: int, vocab_size: int, *, on_cpu: bool) -> int:
    """Counts the most bytes that sampling ``num_rows`` rows of logits, or their log-probabilities, takes beside them.

    A logit takes at most 14 numbers of 4 bytes, where top-k and top-p are searched for in all tokens: a float32 copy
    and its weights, both again for the rows that need the search, its flags, and sums in float64. The first tokens of
    each row that are sorted take as much again, and 16 bytes more each. See workers.sampling.draw.
    """
    padded = -(-vocab_size // _SAMPLING_CHUNK) * _SAMPLING_CHUNK
    at_once = max(1, (SAMPLED_ON_CPU if on_cpu else SAMPLED_ON_GPU) // vocab_size)
    return min(num_rows, at_once) * (56 * padded + 16 * min(padded, _SORTED))


def graphed_tokens(max_num_seqs: int, max_context_tokens: int) -> int:
    """Counts the most tokens that the sequences of a step may have together for a CUDA graph to run it.

    A token that sequences share counts for each of them. Where there are more, reading their KV takes the GPU longer
    than its host takes to launch the kernels one by one, so a graph gains nothing.
    """
    return min(min(max_num_seqs, MOST_GRAPHED) * max_context_tokens, _GRAPHED_TOKENS)


def graph_bytes(model: ModelSpec, *, dtype: DType, max_num_seqs: int) -> int:
    """Counts the bytes that CUDA graphs of up to ``max_num_seqs`` decodes, or MOST_GRAPHED, hold from warm-up on.

    The graphs share a pool of memory, so the largest of them counts. They hold:

    - for every decode, what a token of any step takes, and its logits twice: as they are computed, and as they are
      kept;
    - for each window, the tables of the attention plan: 4 bytes a token, 32 for each part of a decode and half as much
      where parts are shared, and 48 a decode; and 24 bytes a decode for all windows together;
    - partial results of attention, H (D + 1) float32 for each part, in the pool and again for steps without a graph.

    See kernels.cuda.plan.
    """
    decodes = min(max_num_seqs, MOST_GRAPHED)
    tokens = graphed_tokens(max_num_seqs, model.max_context_tokens)
    parts = tokens // _PART + decodes
    tables = len(model.distinct_windows) * (4 * tokens + 48 * parts + 48 * decodes) + 24 * decodes
    partials = 2 * parts * model.num_heads * (model.head_dim + 1) * 4
    logits = 2 * decodes * model.vocab_size * dtype.itemsize
    return decodes * _token_bytes(model, Part.whole(model), dtype) + logits + tables + partials + _GRAPH_SLACK_BYTES


def format_bytes(size: int) -> str:
    """Writes a size for people with three digits: ``512 B``, ``1.5 KiB``, ``256 MiB``, ``2.25 GiB``."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1024:.4g} TiB"


def rounded_size(size: int, *, up: bool, least: int = 1, most: int = 2**63) -> int:
    """Rounds a size to a few digits, as people set it, within ``[least, most]``; ``size`` itself lies there.

    It is at most ``size`` or, rounded up, at least that. What is rounded down is often memory that was free a moment
    ago, so it may lose more.
    """
    assert 0 < least <= size <= most, (least, size, most)
    for unit in (2**30, 2**20, 2**10):
        rounded = (-(-size // unit) if up else size // unit) * unit
        fewest = (100 if up else 10) if unit == 2**30 else 1
        if size >= fewest * unit and least <= rounded <= most:
            return rounded
    return size


def size_words(size: int) -> str:
    """Writes a size exactly, as the cluster YAML takes it: ``410 MiB``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"
