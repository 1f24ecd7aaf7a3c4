"""Which kinds of CPU a machine executes code for, which of them is chosen, and that nothing else is compiled then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu.machine.target import (
    AMX,
    AVX2,
    AVX512BF16,
    AVX512F,
    GENERIC,
    GENERIC_ARM,
    GENERIC_X86,
    NAMES,
    VARIABLE,
    BadTarget,
    Target,
    choose,
    executable_by,
    known_targets,
    runnable_targets,
)

REPOSITORY = Path(__file__).resolve().parents[3]
HASWELL = {"avx", "avx2", "fma", "sse4.2", "pclmul"}
SAPPHIRE = {"avx512bf16", "avx512vbmi", "amx-tile", "amx-bf16"}
SKYLAKE = HASWELL | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}

# Everything that LLVM is given to compile is printed as assembly; then what Numba compiles for.
COMPILE = """
from llvmlite import binding

make = binding.create_mcjit_compiler

def make_and_print(module, machine, **options):
    print(machine.emit_assembly(module))
    return make(module, machine, **options)

binding.create_mcjit_compiler = make_and_print
import torch
from kernels.cpu.attention import lanes
from kernels.cpu.machine.target import chosen
from kernels.cpu.products.linear import ColumnLinear, RoundedColumnLinear
from kernels.cpu.rows import rows
from kernels.rounded import round_weight
from numba.core.registry import cpu_target

x = torch.ones(8, 64).bfloat16()
ColumnLinear(x, None)(x)
RoundedColumnLinear(round_weight(x, bits=4, group_size=64), None)(x)
rows.silu_mul(x)
print("END", chosen().name, lanes.LANES, *cpu_target.target_context.codegen().magic_tuple()[1:], sep="|")
"""


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_a_machine_of_x86_knows_five_targets(machine: str) -> None:
    assert known_targets(machine) == (AMX, AVX512BF16, AVX512F, AVX2, GENERIC_X86)
    assert tuple(known.name for known in known_targets(machine)) == NAMES


@pytest.mark.parametrize(
    ("machine", "expected"), [("aarch64", GENERIC_ARM), ("arm64", GENERIC_ARM), ("riscv64", GENERIC)]
)
def test_any_other_machine_knows_the_generic_one(machine: str, expected: Target) -> None:
    assert known_targets(machine) == (expected,)


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", set(), [GENERIC_X86]),
        ("x86_64", {"avx2"}, [GENERIC_X86]),
        ("x86_64", HASWELL, [AVX2, GENERIC_X86]),
        ("x86_64", HASWELL | {"avx512f"}, [AVX2, GENERIC_X86]),
        ("x86_64", SKYLAKE, [AVX512F, AVX2, GENERIC_X86]),
        ("x86_64", SKYLAKE | {"avx512bf16"}, [AVX512F, AVX512BF16, AVX2, GENERIC_X86]),
        ("x86_64", SKYLAKE | SAPPHIRE, [AMX, AVX512F, AVX512BF16, AVX2, GENERIC_X86]),
        ("aarch64", {"neon", "sve"}, [GENERIC_ARM]),
        ("aarch64", set(), [GENERIC_ARM]),
    ],
)
def test_a_target_needs_all_its_features(machine: str, features: set[str], expected: list[Target]) -> None:
    assert executable_by(machine, "sapphirerapids", features, gives_tiles=lambda: True) == tuple(expected)


def test_amd_multiplies_pairs_faster_than_it_widens_them() -> None:
    features = SKYLAKE | {"avx512bf16"}
    found = executable_by("x86_64", "znver4", features, gives_tiles=lambda: True)
    assert found == (AVX512BF16, AVX512F, AVX2, GENERIC_X86)


def test_a_matrix_unit_that_the_system_keeps_is_none() -> None:
    found = executable_by("x86_64", "sapphirerapids", SKYLAKE | SAPPHIRE, gives_tiles=lambda: False)
    assert found == (AVX512F, AVX512BF16, AVX2, GENERIC_X86)


def test_the_best_is_chosen_unless_one_is_named() -> None:
    runnable = (AVX512F, AVX2, GENERIC_X86)
    assert choose("", runnable) is AVX512F
    assert [choose(name, runnable) for name in ("avx512f", "avx2", "generic")] == [*runnable]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("avx512bf16", "HETERODYNE_CPU_TARGET: 'avx512bf16' is a target that this CPU can't execute."),
        ("AVX2", "HETERODYNE_CPU_TARGET: 'AVX2' is not a target."),
        ("neon", "HETERODYNE_CPU_TARGET: 'neon' is not a target."),
    ],
)
def test_any_other_name_is_refused_with_those_that_are_not(name: str, words: str) -> None:
    with pytest.raises(BadTarget) as caught:
        choose(name, (AVX2, GENERIC_X86))
    assert str(caught.value) == f"{words} Use one of avx2, generic, or leave it out."


def compiled(name: str) -> tuple[str, str]:
    """Compiles in a process for which a target is chosen; returns the assembly, and the line at the end."""
    environment = os.environ | {VARIABLE: name, "PYTHONPATH": str(REPOSITORY)}
    made = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert made.returncode == 0, made.stderr
    assembly, _, end = made.stdout.strip().rpartition("END|")
    return assembly, end


@pytest.mark.parametrize(
    ("expected", "absent"),
    [
        (AVX512BF16, ("tmm",)),
        (AVX512F, ("tmm", "bf16")),
        (AVX2, ("tmm", "zmm", "bf16")),
        (GENERIC_X86, ("tmm", "zmm", "ymm", "vfmadd")),
    ],
    ids=["avx512bf16", "avx512f", "avx2", "generic"],
)
def test_what_the_environment_names_is_what_all_code_is_compiled_for(expected: Target, absent: tuple[str, ...]) -> None:
    if expected not in runnable_targets():
        pytest.skip(f"this CPU can't execute code for {expected.name}")
    assembly, end = compiled(expected.name)
    name, lanes, numba_cpu, numba_features = end.split("|")
    assert "tile_" in assembly and "silu_mul" in assembly
    assert not [word for word in absent if word in assembly]
    assert (name, int(lanes)) == (expected.name, expected.lanes)
    if expected == runnable_targets()[0]:
        return  # code may then use all that this very CPU has
    assert numba_cpu == expected.cpu
    used = {feature.removeprefix("+") for feature in numba_features.split(",") if feature.startswith("+")}
    assert expected.needs <= used <= expected.needs | expected.uses


def test_a_process_whose_target_does_not_exist_says_so() -> None:
    environment = os.environ | {VARIABLE: "sse9", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", "import kernels.cpu.variant"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert ended.returncode != 0
    assert f"{VARIABLE}: 'sse9' is not a target. Use one of " in ended.stderr
