"""The kinds of CPU that code is generated for, each described by what the generators must know of it.

The generators write vectors of 16 float32 numbers, whatever a register holds: LLVM cuts them into the registers of the
target. What they must know is how many there are, and how bfloat16 numbers are multiplied.
"""

import ctypes
import os
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

from llvmlite import binding

VARIABLE = "HETERODYNE_CPU_TARGET"
"""The environment variable that names a lesser target than the CPU's best."""

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_X86, _ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A kind of CPU.

    Attributes:
        name: what users call it.
        cpu: the least CPU of this kind, by LLVM's name.
        needs: the features that its code is compiled for, by LLVM's names.
        uses: further features that its code uses where the CPU has them.
        lanes: how many float32 numbers a vector register holds.
        registers: how many vector registers there are.
        multiplies_pairs: whether one instruction multiplies pairs of bfloat16 numbers and adds both products to a
            float32 sum; where not, they are widened to float32 first, by shift and mask.
        has_matrix_unit: whether it multiplies matrices of bfloat16 (AMX).
        pause: LLVM's function that tells the core that its thread waits for another, and the argument for it; None
            where there is none.
    """

    name: str
    cpu: str
    needs: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    lanes: int
    registers: int
    multiplies_pairs: bool = False
    has_matrix_unit: bool = False
    pause: tuple[str, str] | None = None

    @property
    def registers_per_column(self) -> int:
        """Returns how many registers hold the 16 numbers of a vector."""
        return 16 // self.lanes


# Linux's numbers for x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18
_PAUSE = ("llvm.x86.sse2.pause", "")

AMX = Target(
    name="amx",
    cpu="sapphirerapids",
    needs=_AVX512 | {"avx512bf16", "avx512vbmi", "amx-tile", "amx-bf16"},
    uses=frozenset({"pclmul"}),
    lanes=16,
    registers=32,
    multiplies_pairs=True,
    has_matrix_unit=True,
    pause=_PAUSE,
)
AVX512BF16 = Target(
    name="avx512bf16",
    cpu="cooperlake",
    needs=_AVX512 | {"avx512bf16"},
    uses=frozenset({"pclmul", "avx512vbmi"}),
    lanes=16,
    registers=32,
    multiplies_pairs=True,
    pause=_PAUSE,
)
AVX512F = Target(
    name="avx512f",
    cpu="skylake-avx512",
    needs=_AVX512,
    uses=frozenset({"pclmul"}),
    lanes=16,
    registers=32,
    pause=_PAUSE,
)
AVX2 = Target(
    name="avx2",
    cpu="haswell",
    needs=frozenset({"avx2", "fma"}),
    uses=frozenset({"pclmul"}),
    lanes=8,
    registers=16,
    pause=_PAUSE,
)
GENERIC_X86 = Target(name="generic", cpu="x86-64", lanes=4, registers=16, pause=_PAUSE)
GENERIC_ARM = Target(name="generic", cpu="generic", lanes=4, registers=32, pause=("llvm.aarch64.isb", "i32 15"))
GENERIC = Target(name="generic", cpu="", lanes=4, registers=16)

NAMES = tuple(target.name for target in (AMX, AVX512BF16, AVX512F, AVX2, GENERIC_X86))
"""The names of all targets."""


class BadTarget(ValueError):
    """The environment names a target that there is not, or that this CPU can't execute."""


@cache
def host_features() -> frozenset[str]:
    """Returns the features of this CPU by LLVM's names, for instance ``avx512bf16``."""
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def known_targets(machine: str) -> tuple[Target, ...]:
    """Returns the targets for a machine by its name in :func:`platform.machine`, from the most to the least special."""
    if machine in _X86:
        return AMX, AVX512BF16, AVX512F, AVX2, GENERIC_X86
    return (GENERIC_ARM if machine in _ARM else GENERIC,)


@cache
def runnable_targets() -> tuple[Target, ...]:
    """Returns the targets that this CPU can execute, the fastest first."""
    return executable_by(platform.machine(), host_cpu(), host_features(), gives_tiles=_ask_for_matrix_unit)


def executable_by(
    machine: str, cpu: str, features: Collection[str], *, gives_tiles: Callable[[], bool]
) -> tuple[Target, ...]:
    """Returns the targets that a CPU can execute, the fastest first.

    Args:
        machine: its kind by its name in :func:`platform.machine`.
        cpu: LLVM's name of it.
        features: its features by LLVM's names.
        gives_tiles: asks whether the system lets this process use AMX's registers; only called where the CPU has them.
    """
    has_all = [target for target in known_targets(machine) if target.needs <= frozenset(features)]
    return by_speed(tuple(target for target in has_all if not target.has_matrix_unit or gives_tiles()), cpu)


def host_cpu() -> str:
    """Returns LLVM's name of this CPU, for instance ``znver4``."""
    name: str = binding.get_host_cpu_name()
    return name


def by_speed(targets: tuple[Target, ...], cpu: str) -> tuple[Target, ...]:
    """Orders targets by their speed on a CPU.

    Only AMD multiplies pairs of bfloat16 twice as fast as float32 numbers. On Intel's CPUs it brings nothing, and to
    widen them and multiply is faster by a third.
    """
    if cpu.startswith("znver"):
        return targets
    order = {AVX512BF16.name: 2, AVX512F.name: 1}
    return tuple(sorted(targets, key=lambda target: order.get(target.name, 0 if target == AMX else 3)))


@cache
def _ask_for_matrix_unit() -> bool:
    """Asks Linux for AMX's tile registers, for all threads of this process; tells whether it has them."""
    library = ctypes.CDLL(None)
    return hasattr(library, "syscall") and library.syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA) == 0


def choose(name: str, runnable: tuple[Target, ...]) -> Target:
    """Returns the target of a name, or the first for the empty name. Raises BadTarget."""
    if not name:
        return runnable[0]
    for target in runnable:
        if target.name == name:
            return target
    problem = "is a target that this CPU can't execute" if name in NAMES else "is not a target"
    names = ", ".join(target.name for target in runnable)
    raise BadTarget(f"{VARIABLE}: {name!r} {problem}. Use one of {names}, or leave it out.")


@cache
def chosen() -> Target:
    """Returns the target that this process compiles for: the one that the environment names, or the best.

    Raises:
        BadTarget: the environment names none that this CPU can execute.
    """
    return choose(os.environ.get(VARIABLE, ""), runnable_targets())


def is_forced() -> bool:
    """Tells whether the chosen target is a lesser one than the CPU's best."""
    return chosen() != runnable_targets()[0]


@cache
def features() -> frozenset[str]:
    """Returns the features that this process's code may use: the CPU's, but for a forced target those of its kind."""
    target = chosen()
    return target.needs | (target.uses & host_features()) if is_forced() else host_features()


def has(feature: str) -> bool:
    """Tells whether this process's code may use a feature, by LLVM's name."""
    return feature in features()


def compiled_for() -> tuple[str, str]:
    """Returns the CPU and the features that LLVM compiles for, as it takes them.

    What this CPU lacks of a forced target's least CPU is left out, as virtual machines may hide it.
    """
    if not is_forced():
        return host_cpu(), binding.get_host_cpu_features().flatten()
    lacking = [name for name, has_it in binding.get_host_cpu_features().items() if not has_it]
    return chosen().cpu, ",".join([*(f"+{name}" for name in sorted(features())), *(f"-{name}" for name in lacking)])
