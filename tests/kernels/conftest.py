"""Where a CPU has AMX, its products are left to libraries; tests run the code for AVX512-BF16 there all the same."""

import pytest

from kernels.cpu.products import matmul


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chooses the code for AVX512-BF16 wherever the CPU can run it."""
    monkeypatch.setattr(matmul, "is_supported", matmul.can_run)
