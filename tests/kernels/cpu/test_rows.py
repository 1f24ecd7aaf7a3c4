"""Fused row operations give what the plain ones give, to the last bit but where a sum's order matters."""

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.cpu.rows import rows

pytestmark = pytest.mark.every_target


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


SHAPES = [(1, 16), (1, 2048), (3, 48), (64, 2048), (700, 320)]


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 0.0) -> None:
    """Equal but for a few numbers that lie within an ulp of bfloat16."""
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=atol)
    assert (found != expected).float().mean() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = 3 * torch.randn(shape).bfloat16(), torch.randn(shape[1]).to(dtype)
    before = x.clone()
    close(rows.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_of_a_sum_keeps_the_sum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    update, residual, weight = (torch.randn(size) for size in (shape, shape, shape[1:]))
    update, residual, weight = update.bfloat16(), residual.bfloat16(), weight.to(dtype)
    expected = reference.add_rms_norm(update, residual, weight, 1e-6)
    normed, total = rows.add_rms_norm(update, residual, weight, 1e-6)
    close(normed, expected[0])
    assert torch.equal(total, expected[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_silu(shape: tuple[int, int]) -> None:
    gate_up = 5 * torch.randn(shape[0], 2 * shape[1]).bfloat16()
    close(rows.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_gelu(shape: tuple[int, int]) -> None:
    """Against float64: in float32 torch's tanh leaves nothing of small results. Ours of the smallest is 0."""
    gate_up = 2 * torch.randn(shape[0], 2 * shape[1]).bfloat16()
    gate, up = gate_up.chunk(2, dim=-1)
    close(rows.gelu_mul(gate_up), F.gelu(gate.double(), approximate="tanh").bfloat16() * up, atol=1e-12)


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
def test_gates_of_extremes(name: str) -> None:
    gate = torch.tensor([0.0, -0.0, 80.0, -80.0, 200.0, -200.0, 3e38, -3e38, torch.inf, torch.nan, 1e-30, -1e-30])
    gate_up = torch.cat((gate, torch.zeros(4), torch.full((16,), 2.0))).bfloat16()[None]
    found, expected = getattr(rows, name)(gate_up)[0, :12], getattr(reference, name)(gate_up)[0, :12]
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-30, equal_nan=True)


def test_a_row_has_the_same_bits_in_every_batch_and_on_any_threads() -> None:
    x, weight = torch.randn(200, 512).bfloat16(), torch.randn(512).bfloat16()
    alone = torch.cat([rows.rms_norm(row[None], weight, 1e-5) for row in x])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(rows.rms_norm(x, weight, 1e-5), alone)
    finally:
        torch.set_num_threads(before)


def test_no_rows_are_no_work() -> None:
    assert rows.silu_mul(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 32)


def test_what_it_cannot_read_is_not_supported() -> None:
    assert not rows.is_supported(torch.empty(2, 16))
    assert not rows.is_supported(torch.empty(2, 17, dtype=torch.bfloat16))
    assert not rows.is_supported(torch.empty(2, 32, dtype=torch.bfloat16)[:, :16])
