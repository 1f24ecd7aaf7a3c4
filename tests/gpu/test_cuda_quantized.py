"""Rounded weights on CUDA against the CPU's, where a GPU is at hand."""

import pytest
import torch

from kernels.linear import pack_rounded
from kernels.quantized import Bits, RoundedWeight, dequantize, round_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_rounded_alike(bits: Bits) -> None:
    weight = torch.randn(512, 1024).bfloat16()
    here, there = (
        round_weight(weight, bits=bits, group_size=128),
        round_weight(weight.cuda(), bits=bits, group_size=128),
    )
    error = (dequantize(here, torch.float32) - weight).square().mean()
    there_error = (dequantize(there, torch.float32).cpu() - weight).square().mean()
    torch.testing.assert_close(there_error, error, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_products_are_those_of_the_weight_written_out(bits: Bits, num_tokens: int) -> None:
    rounded = round_weight(torch.randn(640, 1024).cuda(), bits=bits, group_size=128)
    weight = RoundedWeight(
        codes=rounded.codes, scales=rounded.scales, offsets=rounded.scales / 3, order=torch.randperm(1024).cuda()
    )
    x = torch.randn(num_tokens, 1024).cuda().bfloat16()
    assert weight.order is not None
    exact = x.double()[:, weight.order] @ dequantize(weight, torch.float64).T
    layer = pack_rounded(weight, None, torch.bfloat16)
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-6, atol=2**-6 * 1024**0.5)
