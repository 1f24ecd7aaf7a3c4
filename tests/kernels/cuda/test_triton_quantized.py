"""Products with rounded weights in Triton against the weight written out, in float64."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.rounded import Bits, RoundedWeight, dequantize, pack_nibbles, round_weight
from tests.support.triton.triton_cases import DEVICE, DTYPES, HAS_GPU, REASON, RUNS_HERE, normal

if not RUNS_HERE:
    pytest.skip(REASON, allow_module_level=True)

from kernels.cuda import quantized
from kernels.cuda.quantized import TiledLinear, multiply, widened
from kernels.cuda.quantized_kernels import BYTES_TO_BF16, NIBBLES_TO_BF16
from kernels.cuda.quantized_tiles import MOST_TOKENS, TILE_OUTPUTS, tiled

TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BITS = pytest.mark.parametrize("bits", [4, 8])
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8 if HAS_GPU else 2**-7}  # the interpreter cuts off


def rounded(num_outputs: int, num_inputs: int, group_size: int, bits: Bits, *, gptq: bool = False) -> RoundedWeight:
    """A normal weight; with ``gptq`` all codes occur, groups have offsets and columns an order of their own."""
    weight = round_weight(normal(num_outputs, num_inputs, dtype=torch.float32), bits=bits, group_size=group_size)
    if not gptq:
        return weight
    generator = torch.Generator().manual_seed(num_outputs)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (num_outputs, num_inputs), generator=generator)
    signed = codes.to(DEVICE, torch.int8)
    return replace(
        weight,
        codes=signed if bits == 8 else pack_nibbles(signed),
        offsets=normal(*weight.scales.shape, dtype=torch.float32, seed=1) / 4,
        order=torch.randperm(num_inputs, generator=generator).to(DEVICE),
    )


def agrees(layer: TiledLinear, x: Tensor, weight: RoundedWeight, bias: Tensor | None, *, weights: float = 0.0) -> None:
    """The sum's rounding, once, and ``weights``, that of each weight, are all that there may be between them."""
    found, wide = layer(x), dequantize(weight, torch.float64)
    inputs = x.double() if weight.order is None else x.double()[:, weight.order]
    exact = inputs @ wide.T + (0 if bias is None else bias.double())
    size = inputs.abs() @ wide.abs().T + (0 if bias is None else bias.double().abs())
    assert found.shape == exact.shape and found.dtype == x.dtype and found.is_contiguous()
    assert ((found - exact).abs() <= 1.01 * ROUNDING[x.dtype] * exact.abs() + (weights + 1e-6) * size + 1e-9).all()


@settings(deadline=None, max_examples=100 if HAS_GPU else 20)
@given(
    num_outputs=st.integers(1, 2 * TILE_OUTPUTS + 5),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([32, 64, 96, 128, 256]),
    num_tokens=st.integers(1, 20) | st.sampled_from([33, 64, 70]),
    bits=st.sampled_from([4, 8]),
    gptq=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    num_multiprocessors=st.sampled_from([1, 5]),
)
def test_products_are_those_of_the_weight_written_out(
    num_outputs: int,
    groups: int,
    group_size: int,
    num_tokens: int,
    bits: Bits,
    gptq: bool,
    dtype: torch.dtype,
    num_multiprocessors: int,
) -> None:
    num_inputs = groups * group_size
    weight = rounded(num_outputs, num_inputs, group_size, bits, gptq=gptq)
    bias = normal(num_outputs, dtype=dtype, seed=2) if gptq else None
    x = normal(num_tokens, num_inputs + 8, dtype=dtype, seed=3)[:, :num_inputs]  # rows apart in memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "num_multiprocessors", lambda device: num_multiprocessors)
        layer = TiledLinear(weight, bias)
        agrees(layer, x, weight, bias)
    assert layer.num_outputs == num_outputs and not layer._tickets.any()


@TYPES
@BITS
@pytest.mark.parametrize("gptq", [False, True])
def test_many_tokens_are_multiplied_by_the_weight_written_out(
    gptq: bool, bits: Bits, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias = rounded(70, 64, 32, bits, gptq=gptq), normal(70, dtype=torch.float32)
    x = normal(MOST_TOKENS + 1, 64, dtype=dtype, seed=3)
    for bias_or_none in (bias.to(dtype), None):
        layer = TiledLinear(weight, bias_or_none)
        agrees(layer, x, weight, bias_or_none, weights=ROUNDING[dtype])
        whole = layer(x)
        with monkeypatch.context() as patch:
            patch.setattr(quantized, "_WIDENED_AT_ONCE", TILE_OUTPUTS * 64)  # in two parts
            agrees(layer, x, weight, bias_or_none, weights=ROUNDING[dtype])
            torch.testing.assert_close(layer(x), whole, rtol=2 * ROUNDING[dtype], atol=1e-5)


@BITS
def test_a_weight_is_written_out_as_the_reference_writes_it(bits: Bits) -> None:
    weight = rounded(70, 256, 128, bits, gptq=True)
    found = widened(tiled(weight), 0, 2 * TILE_OUTPUTS, torch.float32)
    torch.testing.assert_close(found[:70], dequantize(weight, torch.float32), rtol=1e-6, atol=1e-6)


@BITS
def test_parts_are_summed_alike_each_time_and_leave_the_tickets_at_zero(
    bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "num_multiprocessors", lambda device: 9)
    weight = tiled(rounded(130, 384, 64, bits))
    x, tickets = normal(7, 384, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int32, device=DEVICE)
    first = multiply(x, weight, None, tickets)
    for _ in range(50 if HAS_GPU else 3):
        assert torch.equal(multiply(x, weight, None, tickets), first)
        assert not tickets.any()


@BITS
def test_a_token_that_is_not_a_number_harms_no_other(bits: Bits) -> None:
    layer = TiledLinear(rounded(96, 64, 32, bits, gptq=True), None)
    x = normal(9, 64, dtype=torch.float32)
    expected = layer(x)
    x[4, 3] = torch.nan
    found = layer(x)
    others = [*range(4), *range(5, 9)]
    assert found[4].isnan().all() and torch.equal(found[others], expected[others])


@BITS
def test_no_tokens_are_no_work(bits: Bits) -> None:
    assert TiledLinear(rounded(96, 64, 32, bits), None)(normal(0, 64, dtype=torch.bfloat16)).shape == (0, 96)


INSTRUCTION = re.compile(r"^ +(\w[\w.]+) ([$\w]+), ([$\w]+)(?:, (\w+))?(?:, (\w+))?;", re.MULTILINE)


def run_ptx(program: str, operands: list[str], given: int) -> list[int]:
    """The words that the instructions leave in ``operands``, the last of which they are given a word in."""
    words = {operands[-1]: given}

    def value(name: str) -> int:
        return words[name] if name in words else int(name, 0)

    for name, target, *sources in re.findall(
        r"^ +(\w[\w.]+) ([$\w]+), ([$\w]+)(?:, (\w+))?(?:, (\w+))?;", program, re.M
    ):
        first, *rest = (value(source) for source in sources if source)
        if name == "mov.b32":
            words[target] = first
        elif name == "and.b32":
            words[target] = first & rest[0]
        elif name == "shr.b32":
            words[target] = first >> rest[0]
        elif name == "prmt.b32":
            pool = (first | rest[0] << 32).to_bytes(8, "little")
            chosen = bytes(pool[rest[1] >> shift & 15] for shift in (0, 4, 8, 12))
            words[target] = int.from_bytes(chosen, "little")
        else:
            assert name == "fma.rn.bf16x2", name
            products, factors, addends = (halves(word).double() for word in (first, *rest))
            exact = products * factors + addends
            assert torch.equal(exact.bfloat16().double(), exact)  # nothing is rounded
            words[target] = int(exact.bfloat16().view(torch.int32).item()) & 0xFFFFFFFF
    return [words[name] for name in operands[:-1]]


def halves(word: int) -> Tensor:
    """The two numbers in bfloat16 that a word holds."""
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_instructions_widen_bytes_as_they_are_defined() -> None:
    """By an emulation of the few that there are, because the interpreter has none. Four bytes, all different."""
    for first in range(0, 256, 3):
        four = [(first + step) % 256 for step in (0, 1, 2, 131)]
        word = int.from_bytes(bytes(four), "little")
        nibbles = torch.cat([halves(found) for found in run_ptx(NIBBLES_TO_BF16, ["$0", "$1", "$2", "$3", "$4"], word)])
        assert nibbles.tolist() == [(byte & 15) - 8 for byte in four] + [(byte >> 4) - 8 for byte in four]
        signed = torch.cat([halves(found) for found in run_ptx(BYTES_TO_BF16, ["$0", "$1", "$2"], word)])
        assert signed.tolist() == [byte - 256 if byte > 127 else byte for byte in four]
