"""Norms, activations and rotary embedding in Triton give what the reference gives."""

import pytest
import torch

from kernels import reference
from kernels.attention import LayerCache
from tests.support.triton.triton_cases import DEVICE, DTYPES, REASON, ROW_TOLERANCE, RUNS_HERE, normal

if not RUNS_HERE:
    pytest.skip(REASON, allow_module_level=True)

from kernels.cuda import activations, norms, rope

# A GPU says nothing where the interpreter's numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
EPS = 1e-5
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WIDTHS = pytest.mark.parametrize("width", [1, 33, 1100])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = ROW_TOLERANCE[expected.dtype]
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=2 * tolerance, atol=tolerance)


@TYPES
@WIDTHS
def test_rms_norm_agrees(dtype: torch.dtype, width: int) -> None:
    x, weight = 3 * normal(5, width, dtype=dtype), normal(width, dtype=dtype, seed=1)
    close(norms.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


@TYPES
@WIDTHS
def test_rms_norm_by_a_wider_weight_agrees(dtype: torch.dtype, width: int) -> None:
    x, weight = 3 * normal(5, width, dtype=dtype), 1 + normal(width, dtype=torch.float32, seed=1)
    close(norms.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


@TYPES
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 8), (7, 24), (9, 128)])
def test_rms_norm_of_strided_heads_agrees(dtype: torch.dtype, heads: int, head_dim: int) -> None:
    x = 3 * normal(11, heads + 2, head_dim, dtype=dtype)[:, :heads]
    for weight in (normal(heads, head_dim, dtype=dtype, seed=1), normal(head_dim, dtype=torch.float32, seed=1)):
        close(norms.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


@TYPES
@WIDTHS
def test_add_rms_norm_agrees_and_keeps_the_sum(dtype: torch.dtype, width: int) -> None:
    update, residual = (3 * normal(5, width, dtype=dtype, seed=seed) for seed in (1, 2))
    for weight in (normal(width, dtype=dtype), 1 + normal(width, dtype=torch.float32)):
        expected = reference.add_rms_norm(update, residual, weight, EPS)
        normed, total = norms.add_rms_norm(update.clone(), residual.clone(), weight, EPS)
        close(total, expected[1])
        close(normed, reference.rms_norm(total, weight, EPS))


def test_a_norm_of_nothing_but_zeros_is_zero() -> None:
    zeros, weight = torch.zeros(3, 33, device=DEVICE), torch.ones(33, device=DEVICE)
    assert not norms.rms_norm(zeros, weight, EPS).any()


@TYPES
@WIDTHS
def test_gated_activations_agree(dtype: torch.dtype, width: int) -> None:
    gate_up = 4 * normal(3, 2 * width + 1, dtype=dtype)[:, : 2 * width]
    close(activations.silu_mul(gate_up), reference.silu_mul(gate_up))
    close(activations.gelu_mul(gate_up), reference.gelu_mul(gate_up))


def test_gated_activations_of_extremes_agree() -> None:
    gate = torch.tensor([0.0, -0.0, 80.0, -80.0, 200.0, -200.0, 3e18, -3e18, torch.inf, torch.nan, 1e-30])
    gate_up = torch.cat((gate, torch.full((11,), 2.0)))[None].to(DEVICE)
    for ours, plain in (
        (activations.silu_mul, reference.silu_mul),
        (activations.gelu_mul, reference.gelu_mul),
    ):
        torch.testing.assert_close(ours(gate_up), plain(gate_up), rtol=1e-5, atol=1e-30, equal_nan=True)


@TYPES
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 10), (9, 24), (10, 64), (17, 128)])
def test_rotate_agrees(dtype: torch.dtype, heads: int, head_dim: int) -> None:
    positions = torch.tensor([0, 1, 77, 5000], device=DEVICE)
    frequencies = reference.rope_frequencies(head_dim, 1e4).to(DEVICE)
    tables = reference.rope_tables(positions, frequencies, dtype, 1.3)
    x = normal(4, heads + 2, head_dim, dtype=dtype)[:, 1 : heads + 1]
    close(rope.rotate(x, *tables), reference.rotate(x, *tables))


@TYPES
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 10), (3, 24), (8, 128)])
def test_write_kv_writes_its_slots_only(dtype: torch.dtype, num_kv_heads: int, head_dim: int) -> None:
    caches = [normal(num_kv_heads, 20, head_dim, dtype=dtype, seed=seed) for seed in (1, 2)]
    fused = normal(4, 3 * num_kv_heads, head_dim, dtype=dtype)
    keys, values = fused[:, num_kv_heads : 2 * num_kv_heads], fused[:, 2 * num_kv_heads :]
    found, expected = (LayerCache(keys=caches[0].clone(), values=caches[1].clone()) for _ in range(2))
    slots = torch.tensor([7, -1, 19, 0], device=DEVICE)
    rope.write_kv(found, slots, keys, values)
    kept = slots >= 0  # a slot of -1 belongs to no sequence
    reference.write_kv(expected, slots[kept], keys[kept], values[kept])
    assert torch.equal(found.keys, expected.keys) and torch.equal(found.values, expected.values)


@TYPES
def test_no_rows_are_no_work(dtype: torch.dtype) -> None:
    weight = normal(8, dtype=dtype)
    assert norms.rms_norm(normal(0, 8, dtype=dtype), weight, EPS).shape == (0, 8)
    assert activations.silu_mul(normal(0, 8, dtype=dtype)).shape == (0, 4)
    assert rope.rotate(normal(0, 3, 8, dtype=dtype), *(normal(0, 1, 8, dtype=dtype),) * 2).shape == (0, 3, 8)
