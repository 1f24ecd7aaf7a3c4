"""All code compiles for CPUs that this machine is not, and calls no function that would be missing there."""

from collections.abc import Callable

import pytest

from kernels.cpu.layers import program
from kernels.cpu.machine.machine_code import object_code
from kernels.cpu.machine.target import GENERIC_ARM, Target
from kernels.cpu.products import matmul, quantized
from kernels.cpu.products.quantized_ir import Format
from kernels.cpu.rows import rows
from tests.support.targets.other_machines import MACHINES, NUMBA, numba_ir, undefined_symbols, unknown_symbols

MODULES: dict[str, Callable[[Target], str]] = {"products": matmul.module, "rows": rows.module, "layers": program.module}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", MODULES)
def test_it_compiles_and_needs_nothing(name: str, machine: str) -> None:
    assert not unknown_symbols(MODULES[name](MACHINES[machine]), machine)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offsets", [False, True])
def test_products_with_rounded_weights_do_too(bits: int, offsets: bool, machine: str) -> None:
    form = Format(bits=bits, offsets=offsets, tables=False)
    assert not unknown_symbols(quantized.module(MACHINES[machine], form), machine)


def test_attention_does_too() -> None:
    ir = numba_ir("kernels.cpu.attention.simd", "module.compiled(module.WIDENED)")
    missing = unknown_symbols(ir, "aarch64-linux-gnu")
    assert not {name for name in missing if not NUMBA.match(name)}


def test_a_function_that_is_missing_is_found() -> None:
    """LLVM rounds to its own bfloat16 by a function where the CPU has no instruction for it."""
    ir = """
declare float @llvm.sin.f32(float)
define bfloat @rounded(float %x) {
  %sine = call float @llvm.sin.f32(float %x)
  %narrow = fptrunc float %sine to bfloat
  ret bfloat %narrow
}"""
    assert "sinf" in undefined_symbols(object_code(ir, GENERIC_ARM, "aarch64-linux-gnu"))
    assert unknown_symbols(ir, "x86_64-linux-gnu") == {"sinf", "__truncsfbf2"}
