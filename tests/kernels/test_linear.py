"""Every form of a linear layer computes the same product."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.machine import threads
from kernels.cpu.machine.columns_ir import ColumnTile
from kernels.cpu.products import matmul
from kernels.cpu.products.linear import ColumnLinear, pack, program_linear
from kernels.linear import Linear, PlainLinear
from kernels.rounded import Bits, round_weight
from kernels.select import pack_rounded

SHAPES = [(96, 64), (509, 250), (1, 2048), (2049, 34), (320, 2048)]
FORMS = [ColumnLinear]


def random_layer(shape: tuple[int, int], *, biased: bool = False) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    return weight.bfloat16(), bias.bfloat16() if biased else None


@pytest.mark.parametrize("biased", [False, True])
def test_linear_is_a_matrix_product(biased: bool) -> None:
    x, weight, bias = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)
    layer = PlainLinear(weight, bias if biased else None)
    torch.testing.assert_close(layer(x), x @ weight.T + (bias if biased else 0))
    assert layer.num_outputs == 7
    assert layer.num_bytes == 4 * (35 + 7 * biased)


@pytest.mark.every_target
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [1, 2, 6, 7, 8, 12, 13, 17, 24, 25, 64, 300])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_every_form_agrees_with_plain(form: type, num_tokens: int, shape: tuple[int, int], biased: bool) -> None:
    weight, bias = random_layer(shape, biased=biased)
    x = torch.randn(num_tokens, shape[1]).bfloat16()
    layer: Linear = form(weight, bias)
    plain = PlainLinear(weight, bias)
    # Both sum in float32 and round once: they differ by the order of the sum, at most a unit in the last place.
    torch.testing.assert_close(layer(x), plain(x), rtol=2**-7, atol=2**-7 * shape[1] ** 0.5)
    assert layer.num_outputs == plain.num_outputs
    assert layer.num_bytes >= plain.num_bytes


@pytest.mark.every_target
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_has_the_same_bits_in_every_batch(shape: tuple[int, int]) -> None:
    layer = ColumnLinear(*random_layer(shape, biased=True))
    x = torch.randn(100, shape[1]).bfloat16()
    alone = torch.cat([layer(row[None]) for row in x])
    for num_tokens in (2, 3, 6, 7, 11, 12, 13, 24, 25, 31, 49, 100):
        assert torch.equal(layer(x[:num_tokens]), alone[:num_tokens]), num_tokens


def test_threads_do_not_change_a_bit() -> None:
    layer = ColumnLinear(*random_layer((2049, 34)))
    x = torch.randn(30, 34).bfloat16()
    alone = layer(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x), alone)
    finally:
        torch.set_num_threads(before)


def test_a_batch_of_nothing_and_rows_apart_in_memory() -> None:
    layer = ColumnLinear(*random_layer((96, 64)))
    assert layer(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 96)
    apart = torch.randn(4, 2, 64).bfloat16()[:, 0]
    assert torch.equal(layer(apart), layer(apart.contiguous()))


@pytest.mark.every_target
def test_not_a_number_stays_in_its_row() -> None:
    layer = ColumnLinear(*random_layer((96, 64)))
    x = torch.randn(9, 64).bfloat16()
    expected = layer(x)
    x[4, 3] = torch.nan
    result = layer(x)
    assert result[4].isnan().all()
    assert torch.equal(result[[*range(4), *range(5, 9)]], expected[[*range(4), *range(5, 9)]])


def test_float32_stays_plain() -> None:
    assert isinstance(pack(torch.randn(4, 4), None), PlainLinear)


def test_bfloat16_goes_into_columns() -> None:
    assert isinstance(pack(torch.randn(4, 4).bfloat16(), None), ColumnLinear)


def test_an_odd_number_of_inputs_stays_plain() -> None:
    assert isinstance(pack(torch.randn(4, 5).bfloat16(), None), PlainLinear)


@pytest.mark.every_target
@pytest.mark.parametrize("num_tokens", [1, 3, 5, 8, 11, 24, 64])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_column_tiles_of_a_product_have_the_bits_of_the_whole(num_tokens: int, bits: Bits | None) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    weight = torch.randn(256, 128, generator=generator).to(torch.bfloat16)
    if bits is None:
        layer = pack(weight, None)
    else:
        layer = pack_rounded(round_weight(weight, bits=bits, group_size=64), None, torch.bfloat16)
    whole = program_linear(layer)
    assert whole is not None
    x = torch.randn(num_tokens, 128, generator=generator).to(torch.bfloat16)
    num_tiles, num_rows = whole.tiles(num_tokens)
    tiles = matmul.in_tiles(x, num_tiles, num_rows, whole.layout)
    for count in (1, 2, 8, 16):
        output = torch.empty(num_tiles * num_rows, 256, dtype=torch.bfloat16)
        for number in range(count):
            ticket = torch.zeros(1, dtype=torch.int64)
            addresses = tiles.data_ptr(), output.data_ptr(), ticket.data_ptr()
            threads.run(*whole.product(num_tokens, 2, *addresses, ColumnTile(number, count)), 2)
        assert torch.equal(output[:num_tokens], layer(x))
