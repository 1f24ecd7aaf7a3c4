"""LLVM IR of the operations between a layer's matrix products: zeros, packing of tiles, and rotary embedding."""

from kernels.cpu.machine.numbers_ir import WIDE, WORDS, load, round_and_widen, store
from kernels.cpu.machine.target import Target
from kernels.cpu.machine.work_ir import load_arguments, take_tickets
from kernels.cpu.rows.rows_ir import each_row_function

ROTATE_POINTERS = ("qkv", "cos", "sin", "slot", "query")
ROTATE_SCALARS = ("heads", "kv_heads", "dim", "keys", "values", "num_slots", "weight", "eps")
ZEROS = ("ticket", "at", "num_bytes")
TILES = ("ticket", "num_blocks", "unit", "x", "tiles", "num_tokens", "rows", "num_pairs", "num_chunks")
CHUNK_PAIRS = 64
"""The pairs of inputs that one block of ``pack_tiles`` has."""

_LANES = ", ".join(f"i64 {lane}" for lane in range(16))


HEADER = """
declare void @llvm.masked.scatter.v16i32.v16p0(<16 x i32>, <16 x ptr>, i32, <16 x i1>)
"""


def fill_zeros() -> str:
    """Returns the function ``@fill_zeros(args)``, in which one thread writes zeros to memory."""
    return f"""
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

define void @fill_zeros(ptr %args) {{
entry:{load_arguments(ZEROS)}
  %ticket_ptr = inttoptr i64 %ticket to ptr
  %number = atomicrmw add ptr %ticket_ptr, i64 1 acq_rel
  %is_first = icmp eq i64 %number, 0
  br i1 %is_first, label %fill, label %end
fill:
  %at_ptr = inttoptr i64 %at to ptr
  call void @llvm.memset.p0.i64(ptr %at_ptr, i8 0, i64 %num_bytes, i1 false)
  br label %end
end:
  ret void
}}
"""


def pack_tiles(*, widens: bool) -> str:
    """Returns the function ``@pack_tiles(args)``, or ``@pack_wide_tiles(args)`` where it ``widens``.

    It lays rows [T, I / 2] of pairs of bfloat16 out as ``[tiles, I / 2, rows, 2]``, with zeros where there is no token;
    where it widens, as float32 ``[tiles, I / 2, 2, rows]``. The threads take blocks, each CHUNK_PAIRS pairs of a tile,
    by tickets.
    """
    step = 2 if widens else 1  # words of a pair and row
    return f"""
define void @{"pack_wide_tiles" if widens else "pack_tiles"}(ptr %args) {{
entry:{load_arguments(TILES)}
  %pair_words = mul i64 %rows, {step}
  %rows_0 = insertelement <16 x i64> poison, i64 %pair_words, i32 0
  %rows_all = shufflevector <16 x i64> %rows_0, <16 x i64> poison, <16 x i32> zeroinitializer
  %lanes = mul <16 x i64> %rows_all, <{_LANES}>{take_tickets("num_blocks", "block")}
block:
  %b = phi i64 [%first, %begin], [%b_next, %block_end]
  %tile = sdiv i64 %b, %num_chunks
  %chunk = srem i64 %b, %num_chunks
  %pair_first = mul i64 %chunk, {CHUNK_PAIRS}
  %pair_over = add i64 %pair_first, {CHUNK_PAIRS}
  %is_short = icmp sgt i64 %pair_over, %num_pairs
  %pair_stop = select i1 %is_short, i64 %num_pairs, i64 %pair_over
  %token_first = mul i64 %tile, %rows
  %tile_pairs = mul i64 %token_first, %num_pairs
  %tile_bytes = mul i64 %tile_pairs, {4 * step}
  %tile_at = add i64 %tiles, %tile_bytes
  br label %row{_pack_rows(_STORE_WIDE if widens else _scatter("value", "start"))}
block_end:
  %b_next = add i64 %b, 1
  %more_blocks = icmp slt i64 %b_next, %stop
  br i1 %more_blocks, label %block, label %take
end:
  ret void
}}
"""


def _scatter(value: str, start: str) -> str:
    """Returns code that stores 16 words from ``%start`` on, as far from each other as the pairs of a tile."""
    arguments = f"{WORDS} %{value}, <16 x ptr> %{value}_places, i32 4, <16 x i1> splat (i1 true)"
    return f"""
  %{value}_places = getelementptr i32, ptr %{start}, <16 x i64> %lanes
  call void @llvm.masked.scatter.v16i32.v16p0({arguments})"""


_STORE_WIDE = f"""
  %first_of_pair = shl {WORDS} %value, splat (i32 16)
  %second_of_pair = and {WORDS} %value, splat (i32 -65536)
  %second_start = getelementptr i32, ptr %start, i64 %rows{_scatter("first_of_pair", "start")}{
    _scatter("second_of_pair", "second_start")
}"""


def _pack_rows(store_words: str) -> str:
    """Returns the loop over the rows of a block, and over the pairs of a row, which ``store_words`` stores."""
    return f"""
row:
  %r = phi i64 [0, %block], [%r_next, %row_end]
  %token = add i64 %token_first, %r
  %has_token = icmp slt i64 %token, %num_tokens
  %token_words = mul i64 %token, %num_pairs
  %token_bytes = shl i64 %token_words, 2
  %x_at = add i64 %x, %token_bytes
  %x_ptr = inttoptr i64 %x_at to ptr
  %r_bytes = shl i64 %r, 2
  %column_at = add i64 %tile_at, %r_bytes
  %column_ptr = inttoptr i64 %column_at to ptr
  br label %pair
pair:
  %p = phi i64 [%pair_first, %row], [%p_next, %stored]
  br i1 %has_token, label %load, label %stored
load:
  %from = getelementptr i32, ptr %x_ptr, i64 %p
  %loaded = load <16 x i32>, ptr %from, align 4
  br label %stored
stored:
  %value = phi <16 x i32> [zeroinitializer, %pair], [%loaded, %load]
  %words = mul i64 %p, %pair_words
  %start = getelementptr i32, ptr %column_ptr, i64 %words{store_words}
  %p_next = add i64 %p, 16
  %more_pairs = icmp slt i64 %p_next, %pair_stop
  br i1 %more_pairs, label %pair, label %row_end
row_end:
  %r_next = add i64 %r, 1
  %more_rows = icmp slt i64 %r_next, %rows
  br i1 %more_rows, label %row, label %block_end"""


def _rounded(target: Target, name: str, operation: str, left: str, right: str) -> str:
    """Returns code for an operation whose result ``%name`` is rounded to bfloat16 and widened again."""
    computed = f"""
  %{name}_exact = {operation} {WIDE} %{left}, %{right}"""
    return computed + round_and_widen(target, name, f"{name}_exact")


def rotate(target: Target) -> str:
    """Returns the functions ``@rotate_rows(args)`` and ``@rotate_wide_rows(args)``.

    For each token they norm queries and keys (where there is a weight), apply the rotary embedding, and store keys and
    values in the cache. They round where :func:`kernels.reference.rotate` does. The second reads a norm's weight in
    float32. They need ``@norm`` and ``@norm_wide`` of :func:`kernels.cpu.rows.rows_ir.norm`.
    """
    scalars = [("float" if name == "eps" else "i64", name) for name in ROTATE_SCALARS]
    pointers = [(name, f"{name}_stride") for name in ROTATE_POINTERS]
    tokens = (
        _rotate_token(scalars, wide) + each_row_function(f"rotate{wide}", pointers, scalars) for wide in ("", "_wide")
    )
    return _rotate_head(target) + "".join(tokens) + "declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)\n"


def _rotate_head(target: Target) -> str:
    """Returns the function ``@rotate_head``, which rotates one head."""
    lines = [
        load("low", "x", "%i"),
        load("high", "x", "%j"),
        *(load(f"{name}_{half}", name, at) for name in ("cos", "sin") for half, at in (("low", "%i"), ("high", "%j"))),
        _rounded(target, "kept_low", "fmul", "low", "cos_low"),
        _rounded(target, "moved_low", "fmul", "high", "sin_low"),
        _rounded(target, "new_low", "fadd", "kept_low", "moved_low"),
        _rounded(target, "kept_high", "fmul", "high", "cos_high"),
        _rounded(target, "moved_high", "fmul", "low", "sin_high"),
        _rounded(target, "new_high", "fadd", "kept_high", "moved_high"),
    ]
    return f"""
define void @rotate_head(ptr %x, ptr %cos, ptr %sin, ptr %to, i64 %dim) {{
entry:
  %half = lshr i64 %dim, 1
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i_next, %loop]
  %j = add i64 %i, %half{"".join(lines)}{store("new_low_half", "to", "%i")}{store("new_high_half", "to", "%j")}
  %i_next = add i64 %i, 16
  %more = icmp slt i64 %i_next, %half
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""


def _rotate_token(scalars: list[tuple[str, str]], wide: str) -> str:
    """Returns the function ``@rotate{wide}`` for one token."""
    pointers = ", ".join(f"ptr %{name}" for name in ROTATE_POINTERS)
    return f"""
define void @rotate{wide}({pointers}, {", ".join(f"{kind} %{name}" for kind, name in scalars)}) {{
entry:
  %place = load i64, ptr %slot
  %head_bytes = shl i64 %dim, 1
  %num_rotated = add i64 %heads, %kv_heads
  %is_normed = icmp ne i64 %weight, 0
  br label %each
each:
  %h = phi i64 [0, %entry], [%h_next, %rotated]
  %at = mul i64 %h, %head_bytes
  %x = getelementptr i8, ptr %qkv, i64 %at
  br i1 %is_normed, label %normed, label %plain
normed:
  %weight_by = shl i64 %at, {1 if wide else 0}
  %weight_at = add i64 %weight, %weight_by
  %weight_ptr = inttoptr i64 %weight_at to ptr
  call void @norm{wide}(ptr %x, ptr %x, ptr %weight_ptr, ptr %x, ptr %x, i64 %dim, float %eps)
  br label %plain
plain:
  %is_query = icmp slt i64 %h, %heads
  %kv = sub i64 %h, %heads
  %kv_slots = mul i64 %kv, %num_slots
  %kv_slot = add i64 %kv_slots, %place
  %kv_bytes = mul i64 %kv_slot, %head_bytes
  %key_at = add i64 %keys, %kv_bytes
  %key_ptr = inttoptr i64 %key_at to ptr
  %query_ptr = getelementptr i8, ptr %query, i64 %at
  %to = select i1 %is_query, ptr %query_ptr, ptr %key_ptr
  call void @rotate_head(ptr %x, ptr %cos, ptr %sin, ptr %to, i64 %dim)
  br label %rotated
rotated:
  %h_next = add i64 %h, 1
  %more = icmp slt i64 %h_next, %num_rotated
  br i1 %more, label %each, label %copies{_COPY_VALUES}
done:
  ret void
}}
"""


_COPY_VALUES = """
copies:
  %values_bytes = mul i64 %num_rotated, %head_bytes
  %values_ptr = getelementptr i8, ptr %qkv, i64 %values_bytes
  br label %copy
copy:
  %v = phi i64 [0, %copies], [%v_next, %copy]
  %v_from = mul i64 %v, %head_bytes
  %from = getelementptr i8, ptr %values_ptr, i64 %v_from
  %v_slots = mul i64 %v, %num_slots
  %v_slot = add i64 %v_slots, %place
  %v_bytes = mul i64 %v_slot, %head_bytes
  %value_at = add i64 %values, %v_bytes
  %value_ptr = inttoptr i64 %value_at to ptr
  call void @llvm.memcpy.p0.p0.i64(ptr %value_ptr, ptr %from, i64 %head_bytes, i1 false)
  %v_next = add i64 %v, 1
  %more_values = icmp slt i64 %v_next, %kv_heads
  br i1 %more_values, label %copy, label %done"""
