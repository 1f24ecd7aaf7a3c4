"""Compiled addition against torch's: the same bits."""

import ctypes

import pytest
import torch

from kernels.cpu.machine import machine_code
from workers.collectives import add_ir
from workers.collectives.algorithms import add_in_order

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EDGES = [0.0, -0.0, 1e-39, 3e-40, float("inf"), float("-inf"), float("nan"), 3e38, 1.0, 2.0**-9]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("num_parts", [2, 3, 5])
@pytest.mark.parametrize("into", [0, 1])
def test_parts_are_added_in_their_order_and_rounded_once(name: str, num_parts: int, into: int) -> None:
    address = machine_code.addresses(add_ir.module(), list(add_ir.NAMES.values()))[add_ir.NAMES[name]]
    add = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)(address)
    generator = torch.Generator().manual_seed(num_parts)
    for count in (1, 15, 16, 17, 33, 1000):
        parts = [torch.randn(count, generator=generator).to(DTYPES[name]) for _ in range(num_parts)]
        for at, edge in enumerate(EDGES[:count]):
            parts[at % num_parts][at] = edge
            parts[0][at] = edge
        expected = torch.empty_like(parts[0])
        add_in_order(parts, expected)
        pointers = (ctypes.c_void_p * num_parts)(*(part.data_ptr() for part in parts))
        add(pointers, num_parts, parts[into].data_ptr(), count)
        assert torch.equal(parts[into].isnan(), expected.isnan())
        assert torch.equal(parts[into].nan_to_num(7.0).signbit(), expected.nan_to_num(7.0).signbit())
        assert torch.equal(parts[into].nan_to_num(7.0), expected.nan_to_num(7.0))
