"""CPU targets by the flags that Linux gives a CPU, and the words where the ranks of a replica have several."""

from pathlib import Path

import pytest

from kernels.cpu.machine import target
from placement.measured.targets import CPU_TARGETS, TARGET_VARIABLE, chosen_target, mixed_words, runnable_targets
from placement.model.specs import DType

AVX512 = "avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "runnable"),
    [
        (f"fpu {AVX512} avx512_bf16 avx2 fma", ("avx512bf16", "avx512f", "avx2", "generic")),
        (f"{AVX512} avx2 fma", ("avx512f", "avx2", "generic")),
        ("avx512f avx512_bf16 avx2 fma", ("avx2", "generic")),  # as on a Knights Landing, which has part of AVX-512
        ("avx2", ("generic",)),
        ("sse2", ("generic",)),
    ],
)
def test_a_cpu_runs_the_targets_whose_flags_it_has(flags: str, runnable: tuple[str, ...]) -> None:
    cpu_info = f"processor\t: 0\nmodel name\t: A: CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: sse2\n"
    assert runnable_targets(cpu_info) == runnable


def test_a_cpu_without_known_flags_is_generic() -> None:
    assert runnable_targets("") == runnable_targets("Features\t: fp asimd\n") == ("generic",)


def test_the_kernels_know_the_same_targets_variable_and_this_cpu() -> None:
    assert (CPU_TARGETS, TARGET_VARIABLE) == (target.NAMES, target.VARIABLE)
    here = tuple(each.name for each in target.runnable_targets())
    assert runnable_targets(Path("/proc/cpuinfo").read_text()) == here


def test_the_named_target_is_chosen_where_it_can_be() -> None:
    assert chosen_target("", ("avx2", "generic")) == "avx2"
    assert chosen_target("generic", ("avx2", "generic")) == "generic"
    assert chosen_target("avx512f", ("avx2", "generic")) == chosen_target("avx3", ("generic",)) == ""
    assert chosen_target("", ()) == ""


def test_only_several_targets_in_bfloat16_make_answers_depend_on_who_computes() -> None:
    assert mixed_words("replica-0", ["avx2", "generic", "avx2", ""], DType.BFLOAT16) == (
        "The ranks of replica-0 have the targets avx2 and generic: in bfloat16 answers depend on who computes."
    )
    assert mixed_words("replica-0", ["avx2", "generic"], DType.FLOAT32) == ""
    assert mixed_words("replica-0", ["avx2", "generic"], None) == ""
    assert mixed_words("replica-0", ["avx2", "avx2", ""], DType.BFLOAT16) == ""
