"""LLVM IR of what runs many pieces of work on one team of threads, and of what stands between matrix products.

``program`` is one thread's way through a list of works, each a C function of its job's address. All threads of the
team go through the list together: nobody begins a work before everybody has left the one before.
"""

from kernels.cpu.machine.work_ir import load_job, take_tickets
from kernels.cpu.rows.rows_ir import load, work

PROGRAM = ("num_works", "works", "arrived", "generation", "team_size", "yield", "sleep", "stop")
"""Arguments of ``program``, 64-bit each: addresses of the works, a function and a job each; of two counters, 0 at
first; of the C functions ``omp_get_num_threads`` (0 where there is one thread), ``sched_yield`` and ``usleep``; and of
a word that is not 0 once a work wants the program to end."""

TURN_POINTERS = ("qkv", "cos", "sin", "slot", "query")
TURN_SCALARS = ("heads", "kv_heads", "dim", "keys", "values", "num_slots", "weight", "eps")
ZEROS = ("ticket", "at", "num_bytes")
TILES = ("ticket", "num_blocks", "unit", "x", "tiles", "num_tokens", "rows", "num_pairs", "num_chunks")
CHUNK_PAIRS = 64
"""Pairs of inputs that one block of ``tiles_work`` stands for."""

# A barrier's wait in turns of its loop, some 10 ns each: longer than the others usually take, shorter than it takes to
# sleep and be woken. Whoever waits longer lets others have the core, one of whom may be who is waited for.
_SPINS = 2000
# And in turns of giving it up, after which it sleeps: one thread waits for the network then, and the others for it.
_YIELDS = 1000
_SLEEP_US = 50
# The generation after which all leave. Who comes last at a barrier looks for all whether the program is to end, since
# for one that looks later the next work may have said so already.
_ENDS = -1


_LANES = ", ".join(f"i64 {lane}" for lane in range(16))


def program() -> str:
    """``@program(job)``. The barrier counts arrivals; who comes last begins the next generation."""
    return f"""
declare void @llvm.x86.sse2.pause()

define void @program(ptr %job) {{
entry:{load_job(PROGRAM)}
  %works_ptr = inttoptr i64 %works to ptr
  %arrived_ptr = inttoptr i64 %arrived to ptr
  %generation_ptr = inttoptr i64 %generation to ptr
  %yield_ptr = inttoptr i64 %yield to ptr
  %sleep_ptr = inttoptr i64 %sleep to ptr
  %stop_ptr = inttoptr i64 %stop to ptr
  %alone = icmp eq i64 %team_size, 0
  br i1 %alone, label %begin, label %ask
ask:
  %team_size_ptr = inttoptr i64 %team_size to ptr
  %asked = call i32 %team_size_ptr()
  br label %begin
begin:
  %size_32 = phi i32 [1, %entry], [%asked, %ask]
  %size = sext i32 %size_32 to i64
  %last = sub i64 %size, 1
  br label %each
each:
  %i = phi i64 [0, %begin], [%i_next, %passed]
  %i_next = add i64 %i, 1
  %word = shl i64 %i, 1
  %function_at = getelementptr i64, ptr %works_ptr, i64 %word
  %function = load i64, ptr %function_at
  %argument_at = getelementptr i64, ptr %function_at, i64 1
  %argument = load i64, ptr %argument_at
  %function_ptr = inttoptr i64 %function to ptr
  %argument_ptr = inttoptr i64 %argument to ptr
  call void %function_ptr(ptr %argument_ptr)
  %here = load atomic i64, ptr %generation_ptr acquire, align 8
  %before = atomicrmw add ptr %arrived_ptr, i64 1 acq_rel
  %is_last = icmp eq i64 %before, %last
  br i1 %is_last, label %open, label %wait
open:
  store atomic i64 0, ptr %arrived_ptr monotonic, align 8
  %following = add i64 %here, 1
  %stopped = load i64, ptr %stop_ptr
  %is_stopped = icmp ne i64 %stopped, 0
  %next_generation = select i1 %is_stopped, i64 {_ENDS}, i64 %following
  store atomic i64 %next_generation, ptr %generation_ptr release, align 8
  br label %passed
wait:
  %turns = phi i64 [0, %each], [%turns_next, %again]
  %now = load atomic i64, ptr %generation_ptr acquire, align 8
  %is_open = icmp ne i64 %now, %here
  br i1 %is_open, label %passed, label %spin
spin:
  %turns_next = add i64 %turns, 1
  %is_long = icmp ugt i64 %turns, {_SPINS}
  br i1 %is_long, label %give, label %pause
pause:
  call void @llvm.x86.sse2.pause()
  br label %again
give:
  %is_longer = icmp ugt i64 %turns, {_SPINS + _YIELDS}
  br i1 %is_longer, label %rest, label %let
let:
  %let_ignored = call i32 %yield_ptr()
  br label %again
rest:
  %rest_ignored = call i32 %sleep_ptr(i32 {_SLEEP_US})
  br label %again
again:
  br label %wait
passed:
  %reached = phi i64 [%next_generation, %open], [%now, %wait]
  %goes_on = icmp ne i64 %reached, {_ENDS}
  %is_left = icmp slt i64 %i_next, %num_works
  %more = and i1 %goes_on, %is_left
  br i1 %more, label %each, label %end
end:
  ret void
}}
"""


def zeros() -> str:
    """``@zeros_work(job)``: zeros in memory, by one thread."""
    return f"""
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

define void @zeros_work(ptr %job) {{
entry:{load_job(ZEROS)}
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


def tiles() -> str:
    """``@tiles_work(job)``: rows [T, I / 2] of 32 bits to ``[tiles, I / 2, rows]``, zeros where there is no token."""
    return f"""
declare void @llvm.masked.scatter.v16i32.v16p0(<16 x i32>, <16 x ptr>, i32, <16 x i1>)

define void @tiles_work(ptr %job) {{
entry:{load_job(TILES)}
  %rows_0 = insertelement <16 x i64> poison, i64 %rows, i32 0
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
  %tile_words = mul i64 %token_first, %num_pairs
  %tile_bytes = shl i64 %tile_words, 2
  %tile_at = add i64 %tiles, %tile_bytes
  br label %row
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
  %words = mul i64 %p, %rows
  %start = getelementptr i32, ptr %column_ptr, i64 %words
  %places = getelementptr i32, ptr %start, <16 x i64> %lanes
  call void @llvm.masked.scatter.v16i32.v16p0(<16 x i32> %value, <16 x ptr> %places, i32 4, <16 x i1> splat (i1 true))
  %p_next = add i64 %p, 16
  %more_pairs = icmp slt i64 %p_next, %pair_stop
  br i1 %more_pairs, label %pair, label %row_end
row_end:
  %r_next = add i64 %r, 1
  %more_rows = icmp slt i64 %r_next, %rows
  br i1 %more_rows, label %row, label %block_end
block_end:
  %b_next = add i64 %b, 1
  %more_blocks = icmp slt i64 %b_next, %stop
  br i1 %more_blocks, label %block, label %take
end:
  ret void
}}
"""


def _rounded(name: str, operation: str, left: str, right: str) -> str:
    return f"""
  %{name}_wide = {operation} <16 x float> %{left}, %{right}
  %{name}_bits = fptrunc <16 x float> %{name}_wide to <16 x bfloat>
  %{name} = fpext <16 x bfloat> %{name}_bits to <16 x float>"""


def turn() -> str:
    """``@turn_work(job)``: a token's queries and keys normed (where there is a weight) and turned, its KV stored.

    Rounds where :func:`kernels.reference.rotate` does. ``@turn_wide_work`` takes a norm's weight in float32. Needs
    ``@norm`` and ``@norm_wide`` of :func:`kernels.cpu.rows.rows_ir.norm`.
    """
    pieces = [
        load("low", "x", "%i"),
        load("high", "x", "%j"),
        *(load(f"{name}_{half}", name, at) for name in ("cos", "sin") for half, at in (("low", "%i"), ("high", "%j"))),
        _rounded("kept_low", "fmul", "low", "cos_low"),
        _rounded("moved_low", "fmul", "high", "sin_low"),
        _rounded("new_low", "fadd", "kept_low", "moved_low"),
        _rounded("kept_high", "fmul", "high", "cos_high"),
        _rounded("moved_high", "fmul", "low", "sin_high"),
        _rounded("new_high", "fadd", "kept_high", "moved_high"),
    ]
    head = f"""
define void @turn_head(ptr %x, ptr %cos, ptr %sin, ptr %to, i64 %dim) {{
entry:
  %half = lshr i64 %dim, 1
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%i_next, %loop]
  %j = add i64 %i, %half{"".join(pieces)}
  %to_low = getelementptr bfloat, ptr %to, i64 %i
  store <16 x bfloat> %new_low_bits, ptr %to_low, align 2
  %to_high = getelementptr bfloat, ptr %to, i64 %j
  store <16 x bfloat> %new_high_bits, ptr %to_high, align 2
  %i_next = add i64 %i, 16
  %more = icmp slt i64 %i_next, %half
  br i1 %more, label %loop, label %done
done:
  ret void
}}
"""
    scalars = [("float" if name == "eps" else "i64", name) for name in TURN_SCALARS]
    pointers = [(name, f"{name}_stride") for name in TURN_POINTERS]
    tokens = (_turn_token(scalars, wide) + work(f"turn{wide}", pointers, scalars) for wide in ("", "_wide"))
    return head + "".join(tokens) + "declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)\n"


def _turn_token(scalars: list[tuple[str, str]], wide: str) -> str:
    pointers = ", ".join(f"ptr %{name}" for name in TURN_POINTERS)
    return f"""
define void @turn{wide}({pointers}, {", ".join(f"{kind} %{name}" for kind, name in scalars)}) {{
entry:
  %place = load i64, ptr %slot
  %head_bytes = shl i64 %dim, 1
  %num_turned = add i64 %heads, %kv_heads
  %is_normed = icmp ne i64 %weight, 0
  br label %each
each:
  %h = phi i64 [0, %entry], [%h_next, %turned]
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
  call void @turn_head(ptr %x, ptr %cos, ptr %sin, ptr %to, i64 %dim)
  br label %turned
turned:
  %h_next = add i64 %h, 1
  %more = icmp slt i64 %h_next, %num_turned
  br i1 %more, label %each, label %copies
copies:
  %values_bytes = mul i64 %num_turned, %head_bytes
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
  br i1 %more_values, label %copy, label %done
done:
  ret void
}}
"""
