"""Unpacking of GPTQ's words against numpy, written apart from it."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels import gptq
from kernels.rounded import Bits, dequantize


def packed(fields: NDArray[np.int64], bits: int) -> torch.Tensor:
    """Fields along dim 0 as 32-bit words, the first in the lowest bits."""
    num = 32 // bits
    words = np.zeros((len(fields) // num, fields.shape[1]), np.uint32)
    for i in range(num):
        words |= fields[i::num].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32))


def make(bits: int, *, num_inputs: int = 64, num_outputs: int = 48, group_size: int = 16, zeros: int | None = None):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(bits)
    num_groups = num_inputs // group_size
    codes = rng.integers(0, 1 << bits, (num_inputs, num_outputs))
    middles = (
        rng.integers(1, 1 << bits, (num_groups, num_outputs))
        if zeros is None
        else np.full((num_groups, num_outputs), zeros)
    )
    scales = rng.random((num_groups, num_outputs)).astype(np.float16)
    return codes, middles, scales


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_shift", [0, 1])
@pytest.mark.parametrize("ordered", [False, True])
def test_weights_are_scale_times_code_less_zero(bits: Bits, zero_shift: int, ordered: bool) -> None:
    codes, zeros, scales = make(bits)
    groups = np.arange(64) // 16
    if ordered:
        groups = np.random.default_rng(0).permutation(groups)
    expected = scales.astype(np.float64)[groups] * (codes - zeros[groups])  # [I, O]
    weight = gptq.unpack(
        packed(codes, bits),
        packed((zeros - zero_shift).T, bits).T,
        torch.from_numpy(scales),
        torch.from_numpy(groups).int(),
        bits=bits,
        zero_shift=zero_shift,
        offsets=True,
    )
    found = dequantize(weight, torch.float32).double()
    assert (weight.order is not None) == ordered
    wanted = torch.from_numpy(expected.T)
    torch.testing.assert_close(found, wanted if weight.order is None else wanted[:, weight.order], rtol=1e-5, atol=1e-4)


def test_symmetric_codes_need_no_offsets() -> None:
    codes, zeros, scales = make(4, zeros=8)
    groups = torch.arange(64) // 16
    words = packed((zeros - 1).T, 4).T
    weight = gptq.unpack(packed(codes, 4), words, torch.from_numpy(scales), groups, bits=4, zero_shift=1, offsets=False)
    assert weight.offsets is None
    expected = scales.astype(np.float64)[groups.numpy()] * (codes - 8)
    torch.testing.assert_close(dequantize(weight, torch.float32).double(), torch.from_numpy(expected.T))


def test_zero_points_that_are_not_symmetric_after_all_are_refused() -> None:
    codes, zeros, scales = make(4)
    words, groups = packed((zeros - 1).T, 4).T, torch.arange(64) // 16
    with pytest.raises(ValueError, match="zero points"):
        gptq.unpack(packed(codes, 4), words, torch.from_numpy(scales), groups, bits=4, zero_shift=1, offsets=False)


@pytest.mark.parametrize("groups", [[0] * 17 + [1] * 15 + [2] * 16 + [3] * 16, [5] * 64, [-1] * 16 + [1] * 48])
def test_groups_of_unequal_sizes_are_refused(groups: list[int]) -> None:
    codes, zeros, scales = make(4, zeros=8)
    words = packed((zeros - 1).T, 4).T
    with pytest.raises(ValueError, match="unequal"):
        gptq.unpack(
            packed(codes, 4), words, torch.from_numpy(scales), torch.tensor(groups), bits=4, zero_shift=1, offsets=False
        )
