"""Which variant a device runs, and that Triton is left alone where there is no GPU."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from kernels import reference
from kernels.cpu import variant as cpu
from kernels.cuda import gpus
from kernels.rounded import RoundedLinear, round_weight
from kernels.select import kernels_for, pack_rounded

HAS_TRITON = importlib.util.find_spec("triton") is not None


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_a_cpu_runs_the_cpu_variant() -> None:
    assert kernels_for("cpu") is cpu
    assert kernels_for(torch.device("cpu")) is cpu


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_a_recent_gpu_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    assert type(kernels_for(torch.device("cuda", 1))).__name__ == "CudaKernels"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_rounded_weights_on_a_recent_gpu_are_multiplied_from_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    assert gpus.runs_triton(torch.device("cuda", 1)) and not gpus.runs_triton(torch.device("cpu"))
    monkeypatch.setattr(gpus, "runs_triton", lambda device: True)
    weight = torch.randn(8, 96)
    tiled = pack_rounded(round_weight(weight, bits=4, group_size=32), None, torch.float32)
    assert type(tiled).__name__ == "TiledLinear" and tiled.num_outputs == 8
    odd = pack_rounded(round_weight(weight, bits=4, group_size=24), None, torch.float32)
    assert isinstance(odd, RoundedLinear)


def test_other_devices_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_for("mps") is reference
    pretend(monkeypatch, (7, 5))
    assert kernels_for("cuda:0") is reference
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels_for("cuda:0") is reference


def test_triton_is_not_imported_without_a_gpu() -> None:
    program = (
        "import sys; from kernels.select import kernels_for; import workers.step.graphs;"
        "kernels_for('cpu'); sys.exit('triton' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
