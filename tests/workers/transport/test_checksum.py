"""Checksums by carry-less multiplication, and by tables, against zlib's."""

# mypy: disallow-untyped-decorators=False

import ctypes
import random
import zlib

import numpy as np
import pytest
from numba import njit

from kernels.cpu.machine import machine_code
from kernels.cpu.machine.target import has
from workers.transport import checksum_ir
from workers.transport.frame_code import checksum_table, sliced_checksum

ONES = 0xFFFFFFFF

needs_instruction = pytest.mark.skipif(
    not has(checksum_ir.FEATURE), reason=f"this CPU, or the target, lacks {checksum_ir.FEATURE}"
)
SIZES = pytest.mark.parametrize("num_bytes", [64, 128, 192, 256, 320, 1024, 1 << 16])
BEFORE = pytest.mark.parametrize("before", [b"", b"header", bytes(100)])


@needs_instruction
@SIZES
@BEFORE
def test_what_is_left_has_the_checksum_of_all(num_bytes: int, before: bytes) -> None:
    assert num_bytes % checksum_ir.MIN_BYTES == 0
    data = random.Random(num_bytes).randbytes(num_bytes)
    rest = ctypes.create_string_buffer(16)
    address = machine_code.addresses(checksum_ir.fold(), [checksum_ir.NAME])[checksum_ir.NAME]
    fold = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p)(address)
    fold(data, num_bytes, zlib.crc32(before) ^ ONES, rest)
    assert zlib.crc32(rest.raw, ONES) == zlib.crc32(before + data)


@njit
def by_tables(data, num_bytes, register, table):  # type: ignore[no-untyped-def]
    return sliced_checksum(data, num_bytes, register, table)


@pytest.mark.every_target
@SIZES
@BEFORE
def test_tables_give_the_checksum_of_all(num_bytes: int, before: bytes) -> None:
    data = np.frombuffer(random.Random(num_bytes).randbytes(num_bytes), np.uint8)
    register = by_tables(data, num_bytes, zlib.crc32(before) ^ ONES, checksum_table())
    assert register ^ ONES == zlib.crc32(before + data.tobytes())
