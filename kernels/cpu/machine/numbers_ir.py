"""LLVM IR that widens bfloat16 to float32 and rounds it again, in vectors of 16 numbers.

Memory holds bfloat16 as 16-bit integers here, since LLVM's own type would be computed number by number on targets that
have no instructions for it.
"""

from kernels.cpu.machine.target import Target

WIDE = "<16 x float>"
WORDS = "<16 x i32>"
HALVES = "<16 x i16>"


def load(name: str, pointer: str, index: str) -> str:
    """Returns code that loads 16 numbers of a row of bfloat16 as float32 ``%name``."""
    return f"""
  %{name}_at = getelementptr i16, ptr %{pointer}, i64 {index}
  %{name}_raw = load {HALVES}, ptr %{name}_at, align 2{widen(name, f"{name}_raw")}"""


def store(name: str, pointer: str, index: str) -> str:
    """Returns code that stores 16 rounded numbers in a row of bfloat16."""
    return f"""
  %{name}_to = getelementptr i16, ptr %{pointer}, i64 {index}
  store {HALVES} %{name}, ptr %{name}_to, align 2"""


def widen(name: str, raw: str, lanes: int = 16) -> str:
    """Returns code for float32 ``%name`` of the bits ``%raw`` of bfloat16, which are the upper half of a float32."""
    halves, words, floats = (f"<{lanes} x {kind}>" for kind in ("i16", "i32", "float"))
    return f"""
  %{name}_words = zext {halves} %{raw} to {words}
  %{name}_bits = shl {words} %{name}_words, splat (i32 16)
  %{name} = bitcast {words} %{name}_bits to {floats}"""


def narrow(target: Target, name: str, value: str) -> str:
    """Returns code for the bits ``%name`` of float32 ``%value`` rounded to bfloat16, as the target does it fastest.

    A target's own instruction rounds subnormal numbers to zero, which :func:`narrow_exactly` keeps.
    """
    if not target.multiplies_pairs:
        return narrow_exactly(name, value)
    return f"""
  %{name}_pack = fptrunc {WIDE} %{value} to <16 x bfloat>
  %{name} = bitcast <16 x bfloat> %{name}_pack to {HALVES}"""


def narrow_exactly(name: str, value: str, lanes: int = 16) -> str:
    """Returns code for the bits ``%name`` of float32 ``%value`` rounded to nearest even, as torch does; a NaN stays."""
    halves, words, floats, flags = (f"<{lanes} x {kind}>" for kind in ("i16", "i32", "float", "i1"))
    return f"""
  %{name}_in = bitcast {floats} %{value} to {words}
  %{name}_moved = lshr {words} %{name}_in, splat (i32 16)
  %{name}_odd = and {words} %{name}_moved, splat (i32 1)
  %{name}_bias = add {words} %{name}_odd, splat (i32 32767)
  %{name}_up = add {words} %{name}_in, %{name}_bias
  %{name}_cut = lshr {words} %{name}_up, splat (i32 16)
  %{name}_lost = fcmp uno {floats} %{value}, zeroinitializer
  %{name}_kept = select {flags} %{name}_lost, {words} splat (i32 32704), {words} %{name}_cut
  %{name} = trunc {words} %{name}_kept to {halves}"""


def round_and_widen(target: Target, name: str, value: str) -> str:
    """Returns code for float32 ``%name``, ``%value`` as bfloat16 keeps it; the bits are ``%name_half``."""
    return narrow(target, f"{name}_half", value) + widen(name, f"{name}_half")
