"""Every form of a linear layer computes the same product."""

import pytest
import torch

from kernels import linear
from kernels.linear import PackedLinear, PlainLinear, pack

needs_packing = pytest.mark.skipif(
    not linear._can_pack(torch.empty(1, 1, dtype=torch.bfloat16)), reason="torch cannot pack bfloat16 weights here"
)


@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_a_matrix_product(biased: bool) -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)
    layer = PlainLinear(weight, bias if biased else None)
    torch.testing.assert_close(layer(x), x @ weight.T + (bias if biased else 0))
    assert layer.num_outputs == 7
    assert layer.num_bytes == 4 * (35 + 7 * biased)


@needs_packing
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 17, 64, 300])
@pytest.mark.parametrize("shape", [(96, 64), (509, 250), (1, 2048), (2049, 33)])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_agrees_with_plain(num_tokens: int, shape: tuple[int, int], biased: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    x = torch.randn(num_tokens, shape[1]).bfloat16()
    given = bias if biased else None
    packed, plain = PackedLinear(weight, given), PlainLinear(weight, given)
    # Both sum in float32 and round once: they differ by the order of the sum, at most a unit in the last place.
    torch.testing.assert_close(packed(x), plain(x), rtol=2**-7, atol=2**-7 * shape[1] ** 0.5)
    assert packed.num_outputs == plain.num_outputs and packed.num_bytes == plain.num_bytes


def test_float32_stays_plain() -> None:
    assert isinstance(pack(torch.randn(4, 4), None), PlainLinear)


@needs_packing
def test_bfloat16_is_packed() -> None:
    assert isinstance(pack(torch.randn(4, 4).bfloat16(), None), PackedLinear)


def test_without_the_operators_the_weight_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_can_pack", lambda weight: False)
    assert isinstance(pack(torch.randn(4, 4).bfloat16(), None), PlainLinear)
