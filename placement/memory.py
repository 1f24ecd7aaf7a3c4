"""How many bytes things take: KV blocks, the workspace of a step, a whole rank. Owns the words for a size.

Shapes: T token budget, S most sequences, E hidden size, F feed-forward size, H query heads, K KV heads,
D head dimension, V vocabulary.
"""

from dataclasses import dataclass

from placement.plan import Span
from placement.quantization import LinearFormat, loaded_bytes
from placement.specs import DType, ModelSpec
from placement.weights import EMBEDDING, FINAL_NORM, TensorSlice, weight_bytes

CPU_PROCESS_BYTES = 384 * 2**20
"""A worker process before it loads anything: Python, torch, gRPC (270 MiB measured), allocator slack."""
SCORED_ROWS = 32
"""Positions of a prompt that are scored at once."""
WIDENED_BYTES = 128 * 2**20
"""Of a rounded weight's part that a GPU widens at once (kernels.linear)."""
CUDA_PROCESS_BYTES = 640 * 2**20
"""What a CUDA context, its libraries and the caching allocator's slack take of a GPU."""


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
    slices: tuple[TensorSlice, ...],
    *,
    dtype: DType,
    kv_bytes: int,
    max_num_seqs: int,
    token_budget: int,
    on_cpu: bool,
    linear: LinearFormat | None = None,
) -> Footprint:
    """What a rank that holds ``slices`` and ``kv_bytes`` of KV blocks needs; ``linear`` as its layers are held."""
    has_plain_head = linear is None or linear.head_bits is None
    head_bytes = packed_head_bytes(model, slices, dtype) if on_cpu and has_plain_head else 0
    workspace = workspace_bytes(model, dtype=dtype, max_num_seqs=max_num_seqs, token_budget=token_budget)
    return Footprint(
        weight_bytes=loaded_bytes(slices, dtype, linear) + head_bytes,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace + (0 if on_cpu or linear is None else WIDENED_BYTES),
        process_bytes=CPU_PROCESS_BYTES if on_cpu else CUDA_PROCESS_BYTES,
    )


def packed_head_bytes(model: ModelSpec, slices: tuple[TensorSlice, ...], dtype: DType) -> int:
    """What a tied head takes beside the embedding: packed for the product, it is no longer a table of rows.

    Only bfloat16 is packed (kernels.linear), and only the stage with the final norm has a head.
    """
    has_head = any(slice_.name == FINAL_NORM for slice_ in slices)
    if dtype is not DType.BFLOAT16 or not model.tied_embeddings or not has_head:
        return 0
    return weight_bytes([slice_ for slice_ in slices if slice_.name == EMBEDDING], dtype)


def kv_bytes_per_block(model: ModelSpec, *, dtype: DType, block_size: int, layers: Span, kv_heads: Span) -> int:
    """Bytes of one block on a rank: keys and values, [layers, block_size, KV heads, D] each."""
    return 2 * len(layers) * block_size * len(kv_heads) * model.head_dim * dtype.itemsize


def num_blocks_for(kv_cache_bytes: int, *, bytes_per_block: int) -> int:
    """Whole blocks that fit in ``kv_cache_bytes``."""
    return kv_cache_bytes // bytes_per_block


def num_blocks_of(num_tokens: int, *, block_size: int) -> int:
    """Blocks that a sequence of ``num_tokens`` takes."""
    return -(-num_tokens // block_size)


def workspace_bytes(model: ModelSpec, *, dtype: DType, max_num_seqs: int, token_budget: int) -> int:
    """An upper estimate of what one step allocates at once.

    Per token of the budget: residual, its normed copy, attention output and block output (4E), queries, keys
    and values ((H + 2K) D), gate and up (2F), and the input of a product in tiles (E or F), in ``dtype``. Per
    sequence: one row of V logits in ``dtype``, the same in float32, and its sorted copy with int64 indices for
    sampling; as much for the rows of a prompt that are scored at once.
    """
    attention = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    tiles = max(model.hidden_size, model.ffn_size)
    per_token = 4 * model.hidden_size + attention + 2 * model.ffn_size + tiles
    logits = max(max_num_seqs, SCORED_ROWS) * model.vocab_size * (dtype.itemsize + 16)
    return token_budget * per_token * dtype.itemsize + logits


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
