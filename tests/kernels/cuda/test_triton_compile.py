"""The Triton kernels compile for GPUs, and fit them: Triton brings all that takes, so no GPU is needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
LEAST_SHARED_BYTES = 99 * 1024  # what a block can have on the smallest of these GPUs (compute capability 8.6)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_within_the_limits_of_the_gpu(architecture: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.triton.triton_compile", str(architecture)]
    found = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    kernels = [json.loads(line) for line in found.stdout.splitlines()]
    names = {kernel["name"] for kernel in kernels}
    assert {"decode_kernel", "shared_kernel", "merge_kernel", "chunk_kernel", "_norm_kernel", "_rotate_kernel"} <= names
    assert {"product_kernel", "widen_kernel", "part_kernel", "join_kernel"} <= names
    for kernel in kernels:
        assert kernel["shared_bytes"] <= LEAST_SHARED_BYTES, kernel
        if architecture == 90 and kernel["dtype"] == "torch.bfloat16":
            assert kernel["local_bytes"] == 0, kernel  # registers suffice
