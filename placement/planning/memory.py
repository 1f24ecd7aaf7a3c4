"""How many bytes things take: KV blocks, the workspace of a step, a whole rank. Owns the words for a size.

Shapes: T token budget, S most sequences, E hidden size, F feed-forward size, H query heads, K KV heads,
D head dimension, V vocabulary; F, H and K those of the rank's part.
"""

import math
from dataclasses import dataclass

from placement.model.part import Part, kept_states
from placement.model.quantization import LinearFormat, loaded_bytes
from placement.model.specs import DType, ModelSpec
from placement.model.striping import WHOLE_TOKENS, Stripe
from placement.model.weights import shard_tensors

CPU_PROCESS_BYTES = 384 * 2**20
"""A worker process before it loads anything: Python, torch, gRPC (270 MiB measured), allocator slack."""
SCORED_ROWS = 32
"""Positions of a prompt that are scored at once."""
SAMPLED_ON_CPU, SAMPLED_ON_GPU = 1 << 19, 1 << 23
"""Logits that sampling looks at together: what it makes of them stays in a CPU's caches, or keeps a GPU busy."""
MOST_GRAPHED = 256
"""Decodes of the largest CUDA graph."""
WIDENED_BYTES = 128 * 2**20
"""Of a rounded weight's part that a GPU widens at once (kernels.linear)."""
CUDA_PROCESS_BYTES = 640 * 2**20
"""What a CUDA context, its libraries and the caching allocator's slack take of a GPU."""

_SAMPLING_CHUNK, _SORTED = 256, 1024
_GRAPHED_TOKENS = 1 << 21
_PART = 256
# Of graphs: cuBLAS's workspace for their stream (32 MiB), the driver's copies of their nodes, the pool's rounding.
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
        """All of it."""
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
    max_num_seqs: int,
    token_budget: int,
    on_cpu: bool,
    linear: LinearFormat | None = None,
    num_ranks: int = 1,
    leads: bool = True,
) -> Footprint:
    """What a rank needs.

    Args:
        kv_bytes: of its KV blocks.
        linear: how the weights of its linear layers are held.
        num_ranks: of its stage.
        leads: it is the leader, which samples.
    """
    slices = shard_tensors(model, part)
    has_plain_head = linear is None or linear.head_bits is None
    head_bytes = packed_head_bytes(model, part, dtype) if on_cpu and has_plain_head else 0
    workspace = workspace_bytes(
        model,
        part,
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        on_cpu=on_cpu,
        num_ranks=num_ranks,
        leads=leads,
    )
    if not on_cpu:
        # Steps of several ranks are not recorded.
        workspace += graph_bytes(model, dtype=dtype, max_num_seqs=max_num_seqs) if part == Part.whole(model) else 0
        workspace += 0 if linear is None else 2 * WIDENED_BYTES  # of a step, and in the graphs
    return Footprint(
        weight_bytes=loaded_bytes(slices, dtype, linear) + head_bytes,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace,
        process_bytes=CPU_PROCESS_BYTES if on_cpu else CUDA_PROCESS_BYTES,
    )


def packed_head_bytes(model: ModelSpec, part: Part, dtype: DType) -> int:
    """What a tied head takes beside the embedding: packed for the product, it is no longer a table of rows.

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
    """Whole blocks that fit in ``kv_cache_bytes``."""
    return kv_cache_bytes // bytes_per_block


def num_blocks_of(num_tokens: int, *, block_size: int) -> int:
    """Blocks that a sequence of ``num_tokens`` takes."""
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
    """An upper estimate of what one step allocates at once, but for attention's partial results.

    Per token of the budget see :func:`_token_bytes`; and what other ranks send of it (E each), with a float32 sum of
    three or more. With a stripe, of the budget only :func:`most_own_tokens`, and what :func:`exchange_bytes` says.
    Per sequence a row of logits in ``dtype``, as for the rows of a prompt that are scored at once: those of the rank's
    part, but at the leader of a cut vocabulary all of them, once as they come and once side by side. At the leader also
    what sampling makes of those rows that it looks at together.
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
    """Tokens of a step that a rank with a stripe computes, at most: its share, and of every sequence's ends as many as
    it has slots of a block; or all of chunks that all ranks compute.
    """
    most_ends = max_num_seqs * max(WHOLE_TOKENS, stripe.width)
    return min(token_budget, math.ceil(stripe.share * token_budget) + most_ends)


def exchange_bytes(
    model: ModelSpec, stripe: Stripe, dtype: DType, *, num_ranks: int, num_own: int, token_budget: int
) -> int:
    """What ranks that attend to sequences together give each other in a layer.

    Where queries move, those of all other ranks and what this one answers them with; where KV moves, no more is let
    move at once than that (:func:`most_kv_tokens`). What a rank gives itself is copied: the KV twice. And what each
    rank's KV gives for its own ``num_own`` queries, with the float32 merge of it.
    """
    width = model.num_heads * model.head_dim
    moved = token_budget * 2 * width * dtype.itemsize
    parts = num_own * width * (num_ranks * dtype.itemsize + 3 * 4)
    return math.ceil(moved * (1 + stripe.share)) + parts


def most_kv_tokens(model: ModelSpec, token_budget: int) -> int:
    """Tokens whose KV ranks may give each other in one layer: as many as take what the budget's queries, and what they
    are answered with, do.
    """
    return token_budget * model.queries_per_kv_head


def _token_bytes(model: ModelSpec, part: Part, dtype: DType) -> int:
    """Per token of a step: embedding, residual, its normed copy, block output and result (5E), queries, keys and
    values ((H + 2K) D), turned queries and attention output (2HD), gate, up and what they give (3F), and the input of
    a product in tiles (E or F), in ``dtype``; of a ladder one more block output (E).
    """
    num_kv_heads, ffn_size = len(part.kv_heads), len(part.ffn_columns)
    attention = (3 * model.queries_per_kv_head + 2) * num_kv_heads * model.head_dim
    tiles = max(model.hidden_size, ffn_size)
    return ((6 if model.ladder else 5) * model.hidden_size + attention + 3 * ffn_size + tiles) * dtype.itemsize


def sampling_bytes(num_rows: int, vocab_size: int, *, on_cpu: bool) -> int:
    """The most that sampling, or log-probabilities, of ``num_rows`` rows of logits allocates beside them.

    Per logit at most 14 numbers of 4 bytes: where top-k and top-p are searched for in all tokens, a float32 copy and
    its weights, both again for the rows that need it, the search's flags, and sums in float64. Per row as much again
    for the first tokens in order, and 16 bytes more, where those are sorted. See workers.sampling.draw.
    """
    padded = -(-vocab_size // _SAMPLING_CHUNK) * _SAMPLING_CHUNK
    at_once = max(1, (SAMPLED_ON_CPU if on_cpu else SAMPLED_ON_GPU) // vocab_size)
    return min(num_rows, at_once) * (56 * padded + 16 * min(padded, _SORTED))


def graphed_tokens(max_num_seqs: int, max_context_tokens: int) -> int:
    """Tokens that the sequences of a step may have together, shared ones counted for each, for a CUDA graph to run it.

    Reading the KV of more takes a GPU longer than launching the kernels one by one takes its host.
    """
    return min(min(max_num_seqs, MOST_GRAPHED) * max_context_tokens, _GRAPHED_TOKENS)


def graph_bytes(model: ModelSpec, *, dtype: DType, max_num_seqs: int) -> int:
    """What CUDA graphs of up to ``max_num_seqs`` decodes, or MOST_GRAPHED, hold on to from warm-up on.

    The graphs share a pool, so that of the largest counts: per decode what a token of any step takes, and its logits
    twice, as they are computed and as they are kept. The steps' tables, for each window: 4 bytes a token, 32 for each
    part of a decode and half as much where parts are shared, 48 a decode, and 24 a decode for all windows. Partial
    results, H (D + 1) float32 for each part, in the pool and again for steps that no graph takes. See
    kernels.cuda.plan.
    """
    decodes = min(max_num_seqs, MOST_GRAPHED)
    tokens = graphed_tokens(max_num_seqs, model.max_context_tokens)
    parts = tokens // _PART + decodes
    tables = len(model.distinct_windows) * (4 * tokens + 48 * parts + 48 * decodes) + 24 * decodes
    partials = 2 * parts * model.num_heads * (model.head_dim + 1) * 4
    logits = 2 * decodes * model.vocab_size * dtype.itemsize
    return decodes * _token_bytes(model, Part.whole(model), dtype) + logits + tables + partials + _GRAPH_SLACK_BYTES


def format_bytes(size: int) -> str:
    """For people: ``512 B``, ``1.5 KiB``, ``256 MiB``, ``2.25 GiB``. Three digits are kept."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1024:.4g} TiB"


def size_setting(size: int, *, round_up: bool) -> str:
    """A size as it is written in the cluster YAML, at most (or, rounded up, at least) ``size``."""
    unit, name = (2**20, "MiB") if size >= 2**20 else (2**10, "KiB")
    return f"{-(-size // unit) if round_up else size // unit}{name}"
