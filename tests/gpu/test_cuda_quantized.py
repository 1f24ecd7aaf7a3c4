"""Rounded weights on CUDA, where a GPU is at hand: rounding as on the CPU, products as of the weight written out."""

import pytest
import torch

from kernels.rounded import Bits, RoundedWeight, dequantize, round_weight
from kernels.select import pack_rounded

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


def gptq(num_outputs: int, num_inputs: int, bits: Bits) -> RoundedWeight:
    """A weight with offsets, and columns in an order of their own."""
    rounded = round_weight(torch.randn(num_outputs, num_inputs).cuda(), bits=bits, group_size=128)
    order = torch.randperm(num_inputs).cuda()
    return RoundedWeight(codes=rounded.codes, scales=rounded.scales, offsets=rounded.scales / 3, order=order)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 17, 33, 64, 65, 200, 256, 257, 1000])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(640, 1024), (4096, 4096), (4096, 14336), (28672, 4096)])
def test_products_are_those_of_the_weight_written_out(
    num_outputs: int, num_inputs: int, num_tokens: int, bits: Bits
) -> None:
    weight = gptq(num_outputs, num_inputs, bits)
    x = torch.randn(num_tokens, num_inputs).cuda().bfloat16()
    assert weight.order is not None
    inputs, wide = x.double()[:, weight.order], dequantize(weight, torch.float64)
    exact, size = inputs @ wide.T, inputs.abs() @ wide.abs().T
    layer = pack_rounded(weight, None, torch.bfloat16)
    assert type(layer).__name__ == "TiledLinear"
    # From the codes nothing is rounded but the result; a weight that is written out is rounded itself.
    weights = 0 if num_tokens <= 256 else 2**-8
    assert ((layer(x) - exact).abs() <= 2**-8 * 1.01 * exact.abs() + (weights + 3e-6) * size).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_outputs", [1024, 28672])
def test_a_product_has_the_same_bits_each_time_and_in_every_small_batch(num_outputs: int, bits: Bits) -> None:
    layer = pack_rounded(gptq(num_outputs, 4096, bits), None, torch.bfloat16)
    x = torch.randn(16, 4096).cuda().bfloat16()
    first = layer(x)
    assert all(torch.equal(layer(x), first) for _ in range(200))
    assert all(torch.equal(layer(x[:count]), first[:count]) for count in range(1, 16))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_captured_product_is_computed_anew_each_time(bits: Bits) -> None:
    layer = pack_rounded(gptq(1024, 4096, bits), None, torch.bfloat16)
    x = torch.randn(16, 4096).cuda().bfloat16()
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    for _ in range(20):
        x.normal_()
        graph.replay()
        assert torch.equal(captured, layer(x))
