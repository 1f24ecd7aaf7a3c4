"""Checksums by carry-less multiplication against zlib's."""

import ctypes
import random
import zlib

import pytest

from kernels.cpu.machine import machine_code
from workers.transport import checksum_ir

ONES = 0xFFFFFFFF

pytestmark = pytest.mark.skipif(
    checksum_ir.FEATURE not in machine_code.cpu_features(), reason="this CPU multiplies no polynomials"
)


@pytest.fixture(scope="module")
def fold() -> "ctypes._CFunctionType":
    address = machine_code.addresses(checksum_ir.fold(), [checksum_ir.NAME])[checksum_ir.NAME]
    kinds = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p)
    return ctypes.CFUNCTYPE(None, *kinds)(address)


@pytest.mark.parametrize("num_bytes", [64, 128, 192, 256, 320, 1024, 1 << 16])
@pytest.mark.parametrize("before", [b"", b"header", bytes(100)])
def test_what_is_left_has_the_checksum_of_all(fold: "ctypes._CFunctionType", num_bytes: int, before: bytes) -> None:
    assert num_bytes % checksum_ir.MIN_BYTES == 0
    data = random.Random(num_bytes).randbytes(num_bytes)
    rest = ctypes.create_string_buffer(16)
    fold(data, num_bytes, zlib.crc32(before) ^ ONES, rest)
    assert zlib.crc32(rest.raw, ONES) == zlib.crc32(before + data)
