"""How rounded weights are laid out for a GPU, and products cut: every code in its place, every block in one part."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.cuda.quantized_tiles import MOST_TOKENS, TILE_OUTPUTS, TiledWeight, can_tile, cut, tile_for, tiled
from kernels.rounded import Bits, RoundedWeight, round_weight, unpack_nibbles

BITS = st.sampled_from([4, 8])
LEAST_SHARED_BYTES = 99 * 1024  # what a block can have on GPUs of compute capability 8.6


def rounded(num_outputs: int, num_inputs: int, group_size: int, bits: Bits) -> RoundedWeight:
    weight = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(num_outputs))
    return round_weight(weight, bits=bits, group_size=group_size)


def codes_of(weight: TiledWeight) -> Tensor:
    """Signed codes [O, I], from what the layout is said to be."""
    codes = weight.codes
    if weight.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=2).to(torch.int8) - 8  # a block's first half, and its second
    return codes.transpose(0, 1).flatten(1)[: weight.num_outputs]


@given(
    num_outputs=st.integers(1, 200), groups=st.integers(1, 4), group_size=st.sampled_from([32, 96, 128, 512]), bits=BITS
)
def test_every_code_and_scale_is_in_its_place(num_outputs: int, groups: int, group_size: int, bits: Bits) -> None:
    weight = rounded(num_outputs, groups * group_size, group_size, bits)
    weight = replace(weight, offsets=torch.randn_like(weight.scales))
    found = tiled(weight)
    assert torch.equal(codes_of(found), weight.codes if bits == 8 else unpack_nibbles(weight.codes))
    assert torch.equal(found.scales[:, :num_outputs].T, weight.scales)
    assert found.offsets is not None and weight.offsets is not None
    assert torch.equal(found.offsets[:, :num_outputs].T, weight.offsets)
    assert not found.scales[:, num_outputs:].any() and not found.offsets[:, num_outputs:].any()
    assert found.codes.shape[1] % TILE_OUTPUTS == 0 and found.codes.is_contiguous()
    assert found.num_inputs == groups * group_size and found.num_outputs == num_outputs
    assert found.block * found.blocks_per_group == group_size


def test_padding_is_all_that_is_added() -> None:
    weight = rounded(TILE_OUTPUTS * 3, 512, 128, 4)
    assert tiled(weight).num_bytes == weight.num_bytes
    more = rounded(TILE_OUTPUTS * 3 + 1, 512, 128, 4)
    assert tiled(more).num_bytes == weight.num_bytes * 4 // 3


def test_groups_are_cut_into_blocks_of_tensor_cores() -> None:
    assert all(can_tile(rounded(4, 2 * size, size, 4)) for size in (32, 64, 96, 128, 160, 4096))
    assert not any(can_tile(rounded(4, 2 * size, size, 4)) for size in (10, 16, 48))


@given(
    num_tokens=st.integers(1, MOST_TOKENS),
    block=st.sampled_from([32, 64, 128]),
    bits=BITS,
    itemsize=st.sampled_from([2, 4]),
)
def test_tiles_fit_shared_memory_several_times(num_tokens: int, block: int, bits: Bits, itemsize: int) -> None:
    tile = tile_for(num_tokens, block=block, bits=bits, itemsize=itemsize)
    assert 16 <= tile.tokens < max(17, 2 * num_tokens)
    stage_bytes = TILE_OUTPUTS * block * bits // 8 + tile.tokens * block * itemsize
    assert tile.num_stages >= 2 and tile.num_stages * stage_bytes < LEAST_SHARED_BYTES


@given(
    num_tiles=st.integers(1, 3000), num_blocks=st.integers(1, 500), num_multiprocessors=st.sampled_from([1, 108, 132])
)
def test_no_part_is_empty_nor_are_there_more_than_keep_a_gpu_busy(
    num_tiles: int, num_blocks: int, num_multiprocessors: int
) -> None:
    blocks = cut(num_tiles, num_blocks, num_multiprocessors)
    parts = -(-num_blocks // blocks)
    assert 1 <= blocks <= num_blocks and (parts - 1) * blocks < num_blocks
    assert parts == 1 or blocks >= 2
    assert parts == 1 or (parts - 1) * num_tiles < 3 * num_multiprocessors


@pytest.mark.parametrize(("num_outputs", "num_inputs", "parts"), [(28672, 4096, 1), (4096, 4096, 7), (4096, 14336, 7)])
def test_the_layers_of_a_model_are_cut_so_that_an_h200_is_busy(num_outputs: int, num_inputs: int, parts: int) -> None:
    num_blocks = num_inputs // 128
    assert -(-num_blocks // cut(num_outputs // TILE_OUTPUTS, num_blocks, 132)) == parts
