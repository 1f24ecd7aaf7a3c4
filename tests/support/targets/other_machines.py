"""Code for machines that are not this one: compiled to object files, whose undefined symbols are read."""

import re
import struct
import subprocess
import sys
from pathlib import Path

from kernels.cpu.machine.machine_code import object_code
from kernels.cpu.machine.target import GENERIC_ARM, GENERIC_X86, runnable_targets

MACHINES = {"aarch64-linux-gnu": GENERIC_ARM, "x86_64-linux-gnu": GENERIC_X86}
"""The least target of each machine, by LLVM's name of the machine."""

ALLOWED = frozenset({"memcpy", "memset", "_GLOBAL_OFFSET_TABLE_"})
"""LLVM copies and fills memory by the functions of the C library, which every process has. The linker itself defines
the table. A function for arithmetic, as ``fmaf`` or ``__truncsfbf2``, would mean that the target lacks an instruction
for it, and perhaps the process the function."""

NUMBA = re.compile(r"NRT_|numba_|Py[A-Z_]")
"""What Numba's and Python's own libraries define wherever they run."""

_REPOSITORY = Path(__file__).resolve().parents[3]
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_IS_SYMBOL_TABLE = 2

# Numba makes code for the machine that it runs on. Before it hands it over, LLVM has put an instruction of x86 into the
# counting of references; everything else is plain IR.
_PRINT_IR = """
import platform
platform.machine = lambda: "aarch64"
from kernels.cpu.machine import target
target.host_features = lambda: frozenset({{"neon"}})
from numba import cfunc
import {module} as module

def print_ir(signature, entry, sources):
    print(cfunc(signature)(entry(0)).inspect_llvm())
    return 0

module.c_function = print_ir
{call}
"""
_LESS = re.compile(r"%(\w+) = tail call i8 @llvm\.x86\.atomic\.sub\.cc\.i64\(ptr (?:nonnull )?(%\S+), i64 1, i32 4\)")
_ANY_LESS = r"""%before.\1 = atomicrmw sub ptr \2, i64 1 seq_cst
  %is.\1 = icmp eq i64 %before.\1, 1
  %\1 = zext i1 %is.\1 to i8"""


def unknown_symbols(ir: str, machine: str) -> set[str]:
    """Compiles LLVM IR for a machine's least target; returns the symbols that others must define, but ALLOWED."""
    return undefined_symbols(object_code(ir, MACHINES[machine], machine)) - ALLOWED


def undefined_symbols(code: bytes) -> set[str]:
    """Returns the names of an ELF object file of 64 bits that it uses and does not define."""
    assert code[:6] == b"\x7fELF\x02\x01", "64 bits, little-endian"
    (at,) = struct.unpack_from("<Q", code, 0x28)
    size, count = struct.unpack_from("<HH", code, 0x3A)
    sections = [_SECTION.unpack_from(code, at + i * size) for i in range(count)]
    found = set()
    for _, kind, _, _, start, num_bytes, names, *_ in sections:
        if kind != _IS_SYMBOL_TABLE:
            continue
        for name, _, _, section, *_ in _SYMBOL.iter_unpack(code[start : start + num_bytes]):
            if name and section == 0:
                name_at = sections[names][4] + name
                found.add(code[name_at : code.index(0, name_at)].decode())
    return found


def numba_ir(module: str, call: str) -> str:
    """Returns the LLVM IR of a function that a module has Numba compile by ``c_function``, for any machine.

    Args:
        call: the statement after which it is compiled; the module is ``module`` there.
    """
    script = _PRINT_IR.format(module=module, call=call)
    made = subprocess.run(
        [sys.executable, "-c", script],
        cwd=_REPOSITORY,
        env={"PYTHONPATH": str(_REPOSITORY), "NUMBA_CPU_NAME": runnable_targets()[-1].cpu, "NUMBA_CPU_FEATURES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    ir = re.sub(r"^target (datalayout|triple) = .*\n", "", made.stdout, flags=re.MULTILINE)
    return _LESS.sub(_ANY_LESS, ir)
