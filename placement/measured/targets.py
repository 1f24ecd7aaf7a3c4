"""The kinds of CPU that code is generated for, and what follows where the ranks of a replica have several. Pure.

:mod:`kernels.cpu.machine.target` generates for them. The orchestrator cannot import it, and knows a CPU by the flags
that Linux gives it; a test holds the two together.
"""

from collections.abc import Collection, Mapping, Sequence

from placement.model.specs import DType

TARGET_VARIABLE = "HETERODYNE_CPU_TARGET"
"""The environment variable that names a lesser target than the CPU's best."""

_GENERIC = "generic"
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_NEEDED_FLAGS: Mapping[str, frozenset[str]] = {
    "amx": _AVX512 | {"avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16"},
    "avx512bf16": _AVX512 | {"avx512_bf16"},
    "avx512f": _AVX512,
    "avx2": frozenset({"avx2", "fma"}),
    _GENERIC: frozenset(),
}

CPU_TARGETS = tuple(_NEEDED_FLAGS)
"""The names of all targets."""

_AMD = "AuthenticAMD"


def runnable_targets(cpu_info: str, *, gives_tiles: bool) -> tuple[str, ...]:
    """Returns the targets that a CPU can execute, the fastest first.

    Args:
        cpu_info: the text of ``/proc/cpuinfo``; without flags that are known it is a CPU of the generic kind.
        gives_tiles: whether the system gives processes the tile registers of a CPU that has AMX.
    """
    flags = frozenset(_value(cpu_info, "flags").split())
    usable = flags if gives_tiles else flags - {"amx_tile"}
    runnable = [name for name, needed in _NEEDED_FLAGS.items() if needed <= usable]
    if _value(cpu_info, "vendor_id") != _AMD and "avx512bf16" in runnable:
        # As in kernels.cpu.machine.target.by_speed: only AMD multiplies pairs faster than it widens them.
        runnable.remove("avx512bf16")
        runnable.insert(runnable.index("avx512f") + 1, "avx512bf16")
    return tuple(runnable)


def _value(cpu_info: str, key: str) -> str:
    """Returns what ``/proc/cpuinfo`` says of its first CPU under a key; empty where it says nothing."""
    lines = (line.partition(":") for line in cpu_info.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")


def chosen_target(named: str, runnable: Sequence[str]) -> str:
    """Returns the target that a worker generates code for; empty where it will refuse the one that is named.

    Args:
        named: the value of :data:`TARGET_VARIABLE`; empty where it is not set.
        runnable: the targets that the CPU can execute, the fastest first; empty where they are not known.
    """
    if not named:
        return runnable[0] if runnable else ""
    return named if named in runnable else ""


def mixed_words(replica: str, targets: Collection[str], dtype: DType | None) -> str:
    """Says that answers depend on who computes, where the ranks of a replica have several targets; else nothing.

    Args:
        targets: what the code of each rank is generated for; empty where that is not known.
        dtype: the number type that they compute in; None where that is not known.
    """
    kinds = sorted({target for target in targets if target})
    if len(kinds) < 2 or dtype is not DType.BFLOAT16:
        return ""
    return f"The ranks of {replica} have the targets {' and '.join(kinds)}: in bfloat16 answers depend on who computes."
