"""The kinds of CPU that code is generated for, each described by what the generators must know of it.

The generators write vectors of 16 float32 numbers, whatever a register holds: LLVM cuts them into the registers of the
target. What they must know is how many there are, and how bfloat16 numbers are multiplied.
"""

import ctypes
import os
import platform
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
        pause: LLVM IR that tells the core that its thread waits for another; may be empty.
    """

    name: str
    cpu: str
    needs: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()
    lanes: int
    registers: int
    multiplies_pairs: bool = False
    has_matrix_unit: bool = False
    pause: str = ""

    @property
    def registers_per_column(self) -> int:
        """Returns how many registers hold the 16 numbers of a vector."""
        return 16 // self.lanes


# Linux's numbers for x86-64: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18
_PAUSE = "call void @llvm.x86.sse2.pause()"

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
GENERIC_X86 = Target(name="generic", cpu="x86-64", lanes=4, registers=16)
GENERIC_ARM = Target(name="generic", cpu="generic", needs=frozenset({"neon"}), lanes=4, registers=32)

NAMES = tuple(target.name for target in (AMX, AVX512BF16, AVX512F, AVX2, GENERIC_X86))
"""The names of all targets, the fastest first."""


class BadTarget(ValueError):
    """The environment names a target that there is not, or that this CPU can't execute."""


@cache
def host_features() -> frozenset[str]:
    """Returns the features of this CPU by LLVM's names, for instance ``avx512bf16``."""
    return frozenset(name for name, has in binding.get_host_cpu_features().items() if has)


def known_targets(machine: str) -> tuple[Target, ...]:
    """Returns the targets for a machine by its name in :func:`platform.machine`, the fastest first."""
    if machine in _X86:
        return AMX, AVX512BF16, AVX512F, AVX2, GENERIC_X86
    return (GENERIC_ARM if machine in _ARM else GENERIC_X86,)


def runnable_targets() -> tuple[Target, ...]:
    """Returns the targets that this CPU can execute, the fastest first."""
    known = known_targets(platform.machine())
    return tuple(target for target in known if target.needs <= host_features() and _is_permitted(target))


def _is_permitted(target: Target) -> bool:
    """Tells whether the system lets this process use the target's registers, for which AMX needs to be asked."""
    return not target.has_matrix_unit or _ask_for_matrix_unit()


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
    """Returns the CPU and the features that LLVM compiles for, as it takes them."""
    if not is_forced():
        return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    return chosen().cpu, ",".join(f"+{name}" for name in sorted(features()))
