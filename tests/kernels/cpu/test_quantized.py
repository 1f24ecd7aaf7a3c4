"""Rounding, and every form of a product with rounded weights against the weight written out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import rounded
from kernels.cpu.products.linear import RoundedColumnLinear
from kernels.linear import Linear
from kernels.rounded import Bits, RoundedLinear, RoundedWeight, dequantize, pack_nibbles, round_weight, unpack_nibbles
from kernels.select import pack_rounded

SHAPES = [(96, 64, 32), (509, 256, 128), (1, 2048, 128), (2049, 96, 32), (320, 704, 64)]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 24, 25, 49, 100]
FORMS = [RoundedLinear, RoundedColumnLinear]
BITS = pytest.mark.parametrize("bits", [4, 8])


def random_weight(shape: tuple[int, int, int], bits: Bits, *, gptq: bool = False) -> RoundedWeight:
    """A rounded normal weight; with ``gptq`` all codes occur, groups have offsets and columns an order of their own."""
    torch.manual_seed(sum(shape) + bits)
    num_outputs, num_inputs, group_size = shape
    rounded = round_weight(torch.randn(num_outputs, num_inputs), bits=bits, group_size=group_size)
    if not gptq:
        return rounded
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (num_outputs, num_inputs), dtype=torch.int8)
    return replace(
        rounded,
        codes=codes if bits == 8 else pack_nibbles(codes),
        offsets=torch.randn_like(rounded.scales) / 4,
        order=torch.randperm(num_inputs),
    )


def written_out(weight: RoundedWeight) -> Tensor:
    """The weight [O, I] in float64, its columns where the inputs are."""
    codes = (weight.codes if weight.bits == 8 else unpack_nibbles(weight.codes)).double()
    offsets = torch.zeros_like(weight.scales) if weight.offsets is None else weight.offsets
    scales, offsets = (x.double().repeat_interleave(weight.group_size, 1) for x in (weight.scales, offsets))
    values = codes * scales + offsets
    return values if weight.order is None else values[:, weight.order.argsort()]


@BITS
@pytest.mark.parametrize("shape", SHAPES)
def test_no_weight_is_further_from_its_code_than_half_a_step(bits: Bits, shape: tuple[int, int, int]) -> None:
    weight = torch.randn(shape[:2])
    rounded = round_weight(weight, bits=bits, group_size=shape[2])
    error = (dequantize(rounded, torch.float32) - weight).abs().view(shape[0], -1, shape[2])
    is_clipped = weight.view(error.shape).abs() > (7 if bits == 4 else 127.01) * rounded.scales.abs()[..., None]
    steps = error / rounded.scales.abs()[..., None]
    # The scale of 4 bits was refitted after the codes were chosen, which moves the middles between them a little.
    assert steps[~is_clipped].max() < (0.5001 if bits == 8 else 1.0)
    assert bits == 4 or not is_clipped.any()


def test_four_bits_have_a_third_less_squared_error_than_rounding_to_the_nearest() -> None:
    weight = torch.randn(256, 1024)
    groups = weight.view(256, -1, 128)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    nearest = ((groups / scale).round() * scale - groups).square().mean()
    searched = (dequantize(round_weight(weight, bits=4, group_size=128), torch.float32) - weight).square().mean()
    assert searched < 0.7 * nearest


@BITS
def test_a_weight_of_the_codes_own_values_is_kept(bits: Bits) -> None:
    most = 1 << (bits - 1)
    codes = torch.randint(1 - most, most, (40, 256)).float()
    codes.view(40, -1, 64)[..., 0] = -8 if bits == 4 else 127  # each group's largest, in size
    scales = torch.rand(40, 4) + 0.1
    weight = (codes.view(40, 4, 64) * scales[..., None]).view(40, 256)
    rounded = round_weight(weight, bits=bits, group_size=64)
    torch.testing.assert_close(dequantize(rounded, torch.float32), weight)


@BITS
def test_a_group_of_zeros_stays_zero(bits: Bits) -> None:
    weight = torch.randn(4, 128)
    weight[1, 64:] = 0
    rounded = dequantize(round_weight(weight, bits=bits, group_size=64), torch.float32)
    assert not rounded[1, 64:].any()
    assert rounded.isfinite().all()


@BITS
def test_rounding_in_parts_changes_nothing(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 256).bfloat16()
    whole = round_weight(weight, bits=bits, group_size=128)
    monkeypatch.setattr(rounded, "_ROUNDED_AT_ONCE", 5 * 256)
    parts = round_weight(weight, bits=bits, group_size=128)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales)


@given(st.lists(st.lists(st.integers(-8, 7), min_size=6, max_size=6), min_size=1, max_size=4))
def test_nibbles_come_back(rows: list[list[int]]) -> None:
    codes = torch.tensor(rows, dtype=torch.int8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.every_target
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gptq", [False, True])
@BITS
def test_every_form_multiplies_by_the_weight_written_out(
    form: Any, num_tokens: int, shape: tuple[int, int, int], gptq: bool, bits: Bits
) -> None:
    weight = random_weight(shape, bits, gptq=gptq)
    bias = torch.randn(shape[0]).bfloat16()
    x = torch.randn(num_tokens, shape[1]).bfloat16()
    layer: Linear = form(weight, bias)
    exact = x.double() @ written_out(weight).T + bias.double()
    size = x.double().abs() @ written_out(weight).abs().T
    # The result is rounded once; the plain form also rounds each weight to bfloat16, the other only sums in float32.
    limit = 2**-8 * exact.abs() + (2**-8 if form is RoundedLinear else 1e-6) * size + 1e-6
    assert ((layer(x) - exact).abs() <= 1.01 * limit).all()
    assert layer.num_outputs == shape[0]
    assert layer.num_bytes >= weight.num_bytes


@pytest.mark.parametrize("gptq", [False, True])
@BITS
def test_in_float32_nothing_is_rounded_again(gptq: bool, bits: Bits) -> None:
    weight = random_weight((509, 256, 128), bits, gptq=gptq)
    x, bias = torch.randn(7, 256), torch.randn(509)
    layer = pack_rounded(weight, bias, torch.float32)
    exact = x.double() @ written_out(weight).T + bias.double()
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.every_target
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gptq", [False, True])
@BITS
def test_a_token_has_the_same_bits_in_every_batch(shape: tuple[int, int, int], gptq: bool, bits: Bits) -> None:
    layer = RoundedColumnLinear(random_weight(shape, bits, gptq=gptq), torch.randn(shape[0]))
    x = torch.randn(100, shape[1]).bfloat16()
    alone = torch.cat([layer(row[None]) for row in x])
    for num_tokens in TOKENS:
        assert torch.equal(layer(x[:num_tokens]), alone[:num_tokens]), num_tokens


@BITS
def test_threads_do_not_change_a_bit(bits: Bits) -> None:
    layer = RoundedColumnLinear(random_weight((2049, 96, 32), bits), None)
    x = torch.randn(30, 96).bfloat16()
    alone = layer(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gptq", [False, True])
@BITS
def test_a_batch_of_nothing_and_rows_apart_in_memory(gptq: bool, bits: Bits) -> None:
    layer = RoundedColumnLinear(random_weight((96, 64, 32), bits, gptq=gptq), None)
    x = torch.randn(9, 128).bfloat16()
    assert layer(x[:0, :64]).shape == (0, 96)
    assert torch.equal(layer(x[:, :64]), layer(x[:, :64].contiguous()))


@pytest.mark.every_target
@pytest.mark.parametrize("gptq", [False, True])
@BITS
def test_a_token_that_is_not_a_number_harms_no_other(gptq: bool, bits: Bits) -> None:
    layer = RoundedColumnLinear(random_weight((96, 64, 32), bits, gptq=gptq), None)
    x = torch.randn(9, 64).bfloat16()
    expected = layer(x)
    x[4, 3] = torch.nan
    result = layer(x)
    assert result[4].isnan().all()
    others = [*range(4), *range(5, 9)]
    assert torch.equal(result[others], expected[others])


@BITS
def test_packed_codes_take_no_more_than_bits_and_scales(bits: Bits) -> None:
    layer = RoundedColumnLinear(random_weight((512, 1024, 128), bits), None)
    assert layer.num_bytes == 512 * 1024 * bits // 8 + 512 * 8 * 4 + 512 * 4


def test_bfloat16_goes_into_columns_where_groups_fill_lines() -> None:
    weight = random_weight((96, 64, 32), 4)
    assert isinstance(pack_rounded(weight, None, torch.bfloat16), RoundedColumnLinear)
    assert isinstance(pack_rounded(weight, None, torch.float32), RoundedLinear)
    odd = round_weight(torch.randn(8, 20), bits=4, group_size=10)
    assert isinstance(pack_rounded(odd, None, torch.bfloat16), RoundedLinear)
