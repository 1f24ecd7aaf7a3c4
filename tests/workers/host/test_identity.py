"""What a worker says that it is: its target, and the digest of its code."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.cpu.machine import target
from placement.errors import InvalidConfig
from workers.host import identity

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def chosen_anew() -> Iterator[None]:
    """A process keeps its target, and tests choose several."""
    target.chosen.cache_clear()
    yield
    target.chosen.cache_clear()


def test_the_target_of_a_cpu_is_the_best_or_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(target.VARIABLE, raising=False)
    assert identity.target_of(CPU) == target.runnable_targets()[0].name
    target.chosen.cache_clear()
    monkeypatch.setenv(target.VARIABLE, "generic")
    assert identity.target_of(CPU) == "generic"


def test_a_gpu_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H200 {device.index}")
    assert identity.target_of(torch.device("cuda", 1)) == "cuda NVIDIA H200 1"


@pytest.mark.parametrize(("named", "problem"), [("avx3", "'avx3' is not a target"), ("avx2", "can't execute")])
def test_a_wrong_target_is_refused_with_those_that_can_be(
    monkeypatch: pytest.MonkeyPatch, named: str, problem: str
) -> None:
    monkeypatch.setattr(target, "runnable_targets", lambda: (target.GENERIC_X86,))
    monkeypatch.setenv(target.VARIABLE, named)
    with pytest.raises(InvalidConfig) as caught:
        identity.target_of(CPU)
    assert caught.value.field == "environment variable HETERODYNE_CPU_TARGET"
    assert problem in caught.value.problem
    assert caught.value.fix == "Set it to one of generic on this machine, or unset it."


def test_other_code_has_another_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in identity._PACKAGES:
        (tmp_path / package).mkdir(parents=True)
    monkeypatch.setattr(identity, "_ROOT", tmp_path)
    digests = set()
    (tmp_path / "tests").mkdir()
    for name, text in (("workers/a.py", "1"), ("workers/a.py", "2"), ("kernels/a.py", "2"), ("tests/a.py", "3")):
        (tmp_path / name).write_text(text)
        digests.add(identity.code_digest.__wrapped__())
    assert len(digests) == 3, "tests are no part of what a rank runs"
