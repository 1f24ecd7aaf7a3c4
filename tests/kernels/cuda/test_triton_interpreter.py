"""The Triton kernels' tests, run under Triton's interpreter in processes of their own, so that no GPU is needed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.triton.triton_cases import RUNS_HERE

REPOSITORY = Path(__file__).resolve().parents[3]
KERNELS = (
    "tests/kernels/cuda/test_triton_rows.py",
    "tests/kernels/cuda/test_triton_attention.py",
    "tests/kernels/cuda/test_triton_shared.py",
    "tests/kernels/cuda/test_triton_parts.py",
    "tests/kernels/cuda/test_triton_quantized.py",
)
MODELS = (
    "tests/workers/model/test_triton_decoder.py",
    "tests/workers/replica/test_triton_ranks.py",
    "tests/workers/step/test_graphs.py",
    "tests/gpu/test_bench_kernels.py",
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or RUNS_HERE,
    reason="Triton is not installed, or these tests run by themselves: on a GPU, or already interpreted",
)


@pytest.mark.timeout(480)
@pytest.mark.parametrize("modules", [KERNELS, MODELS], ids=["kernels", "models"])
def test_kernels_agree_with_the_reference_under_the_interpreter(modules: tuple[str, ...]) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules]
    found = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "skipped" not in found.stdout, found.stdout
