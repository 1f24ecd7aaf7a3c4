"""CPU targets by the flags that Linux gives a CPU, and the words where the ranks of a replica have several."""

import pytest

from kernels.cpu.machine import target
from orchestrator.launcher.node import cpu_targets
from placement.measured.targets import CPU_TARGETS, TARGET_VARIABLE, chosen_target, mixed_words, runnable_targets
from placement.model.specs import DType

AVX512 = "avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("flags", "runnable"),
    [
        (f"fpu {AVX512} avx512_bf16 avx2 fma", ("avx512f", "avx512bf16", "avx2", "generic")),
        (f"{AVX512} avx2 fma", ("avx512f", "avx2", "generic")),
        ("avx512f avx512_bf16 avx2 fma", ("avx2", "generic")),  # as on a Knights Landing, which has part of AVX-512
        ("avx2", ("generic",)),
        ("sse2", ("generic",)),
    ],
)
def test_a_cpu_runs_the_targets_whose_flags_it_has(flags: str, runnable: tuple[str, ...]) -> None:
    cpu_info = f"processor\t: 0\nmodel name\t: A: CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: sse2\n"
    assert runnable_targets(cpu_info, gives_tiles=True) == runnable


def test_only_amd_multiplies_pairs_faster_than_it_widens_them() -> None:
    cpu_info = f"vendor_id\t: AuthenticAMD\nflags\t\t: {AVX512} avx512_bf16 avx2 fma\n"
    assert runnable_targets(cpu_info, gives_tiles=True) == ("avx512bf16", "avx512f", "avx2", "generic")


def test_a_cpu_without_known_flags_is_generic() -> None:
    for cpu_info in ("", "Features\t: fp asimd\n"):
        assert runnable_targets(cpu_info, gives_tiles=True) == ("generic",)


def test_a_system_that_gives_no_tiles_leaves_a_cpu_its_vectors() -> None:
    cpu_info = f"flags: {AVX512} avx512_bf16 avx512vbmi amx_tile amx_bf16 avx2 fma\n"
    vectors = ("avx512f", "avx512bf16", "avx2", "generic")
    assert runnable_targets(cpu_info, gives_tiles=True) == ("amx", *vectors)
    assert runnable_targets(cpu_info, gives_tiles=False) == vectors


def test_the_kernels_know_the_same_targets_variable_and_this_cpu() -> None:
    assert (CPU_TARGETS, TARGET_VARIABLE) == (target.NAMES, target.VARIABLE)
    here = tuple(each.name for each in target.runnable_targets())
    assert cpu_targets() == here


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
