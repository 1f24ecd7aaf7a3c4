"""LLVM IR that adds the ranks' parts of a sum, in rank order and in float32, and rounds once, to nearest even."""

from kernels.cpu.machine.numbers_ir import narrow_exactly, widen

_LANES = 16

NAMES = {"bfloat16": "add_bfloat16", "float32": "add_float32"}
"""The name of the function for each number type."""


def _widened(name: str, at: str, number: str, lanes: int) -> str:
    """Returns code that loads the numbers at ``%at`` and widens them to float32 as ``%name``."""
    if number == "float32":
        return f"\n  %{name} = load {_many('float', lanes)}, ptr %{at}, align 4"
    return f"\n  %{name}_raw = load {_many('i16', lanes)}, ptr %{at}, align 2" + widen(name, f"{name}_raw", lanes)


def _stored(value: str, at: str, number: str, lanes: int) -> str:
    """Returns code that rounds and stores, alike on every CPU, since all ranks must come to the same bits."""
    if number == "float32":
        return f"\n  store {_many('float', lanes)} %{value}, ptr %{at}, align 4"
    stored = f"\n  store {_many('i16', lanes)} %{value}_half, ptr %{at}, align 2"
    return narrow_exactly(f"{value}_half", value, lanes) + stored


def _many(kind: str, lanes: int) -> str:
    return f"<{lanes} x {kind}>"


def _loop(number: str, lanes: int) -> str:
    """Loops over whole vectors of ``lanes`` numbers, and goes on to ``done_{lanes}`` where fewer are left."""
    before = "entry" if lanes == _LANES else f"done_{_LANES}"
    start = "0" if lanes == _LANES else f"%i_{_LANES}"
    kind, floats = {"bfloat16": "i16", "float32": "float"}[number], _many("float", lanes)
    return f"""
  br label %head_{lanes}
head_{lanes}:
  %i_{lanes} = phi i64 [{start}, %{before}], [%next_{lanes}, %end_{lanes}]
  %next_{lanes} = add i64 %i_{lanes}, {lanes}
  %fits_{lanes} = icmp sle i64 %next_{lanes}, %count
  br i1 %fits_{lanes}, label %body_{lanes}, label %done_{lanes}
body_{lanes}:
  %first_{lanes} = load ptr, ptr %parts
  %first_at_{lanes} = getelementptr {kind}, ptr %first_{lanes}, i64 %i_{lanes}{
        _widened(f"begun_{lanes}", f"first_at_{lanes}", number, lanes)
    }
  br label %each_{lanes}
each_{lanes}:
  %p_{lanes} = phi i64 [1, %body_{lanes}], [%p_next_{lanes}, %each_{lanes}]
  %sum_{lanes} = phi {floats} [%begun_{lanes}, %body_{lanes}], [%total_{lanes}, %each_{lanes}]
  %part_{lanes} = getelementptr ptr, ptr %parts, i64 %p_{lanes}
  %other_{lanes} = load ptr, ptr %part_{lanes}
  %other_at_{lanes} = getelementptr {kind}, ptr %other_{lanes}, i64 %i_{lanes}{
        _widened(f"more_{lanes}", f"other_at_{lanes}", number, lanes)
    }
  %total_{lanes} = fadd {floats} %sum_{lanes}, %more_{lanes}
  %p_next_{lanes} = add i64 %p_{lanes}, 1
  %is_part_{lanes} = icmp slt i64 %p_next_{lanes}, %num_parts
  br i1 %is_part_{lanes}, label %each_{lanes}, label %end_{lanes}
end_{lanes}:
  %into_{lanes} = getelementptr {kind}, ptr %into, i64 %i_{lanes}{
        _stored(f"total_{lanes}", f"into_{lanes}", number, lanes)
    }
  br label %head_{lanes}
done_{lanes}:"""


def add(number: str) -> str:
    """Returns the function ``@add_{number}(parts, num_parts, into, count)``.

    It adds parts of ``count`` numbers each; ``into`` may be one of them.

    Args:
        number: ``bfloat16`` or ``float32``.
    """
    return f"""
define void @{NAMES[number]}(ptr %parts, i64 %num_parts, ptr %into, i64 %count) {{
entry:{_loop(number, _LANES)}{_loop(number, 1)}
  ret void
}}
"""


def module() -> str:
    """Returns the functions for all number types."""
    return "".join(map(add, NAMES))
