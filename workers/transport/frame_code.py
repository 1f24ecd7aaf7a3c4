"""Headers and checksums of :mod:`workers.transport.frames` for compiled code, which is given addresses of memory.

All numbers are 64-bit integers. ``table_at`` is the address of :func:`checksum_table`, and ``fold`` is the address of
the function of :mod:`workers.transport.checksum_ir`, or 0 where the CPU has no instruction for it.
"""

# mypy: disallow-untyped-decorators=False, disallow-any-unimported=False

import zlib
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from kernels.cpu.attention.intrinsics import pointer
from workers.transport.checksum_ir import MIN_BYTES
from workers.transport.frames import FIELD_BYTES, MAGIC, Kind

OPTIONS = {"error_model": "numpy", "nogil": True}
_ONES = 0xFFFFFFFF
_KIND = int(Kind.TENSOR)
_MAGIC = int.from_bytes(MAGIC, "little")
_jit = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)


_SLICES = 8


def checksum_table() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns [8, 256]: the register of a checksum that was 0 before a byte and up to 7 bytes of zeros after it."""
    table = np.empty((_SLICES, 256), np.int64)
    table[0] = [zlib.crc32(bytes([byte]), _ONES) ^ _ONES for byte in range(256)]
    for zeros in range(1, _SLICES):
        before = table[zeros - 1]
        table[zeros] = table[0][before & 255] ^ (before >> 8)
    return table


@intrinsic
def call_four(context, function, first, second, third, fourth):  # type: ignore[no-untyped-def]
    """Calls ``void function(int64, int64, int64, int64)``; pointers may be passed as integers."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@_jit
def words_at(address, shape):  # type: ignore[no-untyped-def]
    """Views the memory at an address as 64-bit integers of that shape."""
    return carray(pointer(address, np.int64(0)), shape)


@_jit
def bytes_at(address, count):  # type: ignore[no-untyped-def]
    """Views the memory at an address as bytes."""
    return carray(pointer(address, np.uint8(0)), count)


@_jit
def load(data, at, count):  # type: ignore[no-untyped-def]
    """Reads a little-endian number of ``count`` bytes."""
    value = np.int64(0)
    for i in range(count):
        value |= np.int64(data[at + i]) << (8 * i)
    return value


@_jit
def store(data, at, value, count):  # type: ignore[no-untyped-def]
    """Writes a little-endian number of ``count`` bytes."""
    for i in range(count):
        data[at + i] = np.uint8((value >> (8 * i)) & 255)


@_jit
def checksum(data, start, stop, register, table):  # type: ignore[no-untyped-def]
    """Returns a checksum's register, not inverted, after the bytes from ``start`` to ``stop``."""
    for i in range(start, stop):
        register = table[0, (register ^ data[i]) & 255] ^ (register >> 8)
    return register


@_jit
def sliced_checksum(data, num_bytes, register, table):  # type: ignore[no-untyped-def]
    """As :func:`checksum` of the first bytes, a multiple of 8, by eight lookups at once (Kounavis and Berry 2005)."""
    for i in range(0, num_bytes, 8):
        register = (
            table[7, (register ^ data[i]) & 255]
            ^ table[6, ((register >> 8) ^ data[i + 1]) & 255]
            ^ table[5, ((register >> 16) ^ data[i + 2]) & 255]
            ^ table[4, ((register >> 24) ^ data[i + 3]) & 255]
            ^ table[3, data[i + 4]]
            ^ table[2, data[i + 5]]
            ^ table[1, data[i + 6]]
            ^ table[0, data[i + 7]]
        )
    return register


@_jit
def payload_checksum(register, start, rows, row_bytes, stride, fold, table_at):  # type: ignore[no-untyped-def]
    """Returns a checksum's register after ``rows`` rows of memory, which lie ``stride`` bytes apart."""
    table = words_at(table_at, (_SLICES, 256))
    folded = row_bytes - row_bytes % (MIN_BYTES if fold != 0 else _SLICES)
    rest = np.empty(16, np.uint8)
    for row in range(rows):
        at = start + row * stride
        if folded > 0 and fold == 0:
            register = sliced_checksum(bytes_at(at, folded), folded, register, table)
        elif folded > 0:
            call_four(fold, at, folded, register, rest.ctypes.data)
            register = checksum(rest, 0, 16, np.int64(0), table)
        register = checksum(bytes_at(at, row_bytes), folded, row_bytes, register, table)
    return register


@_jit
def frame_checksum(head, start, rows, row_bytes, stride, fold, table_at):  # type: ignore[no-untyped-def]
    """Returns the checksum of a header's fields and the payload."""
    register = checksum(head, 0, FIELD_BYTES, np.int64(_ONES), words_at(table_at, (_SLICES, 256)))
    return payload_checksum(register, start, rows, row_bytes, stride, fold, table_at) ^ _ONES


@_jit
def write_header(head, epoch, number, num_bytes):  # type: ignore[no-untyped-def]
    """Writes a header without its checksum, as :func:`workers.transport.frames.header` does."""
    store(head, 0, np.int64(_MAGIC), 4)
    store(head, 4, np.int64(_KIND), 4)
    store(head, 8, epoch, 8)
    store(head, 16, number, 8)
    store(head, 24, num_bytes, 8)


@_jit
def is_due(head, epoch, number, num_bytes):  # type: ignore[no-untyped-def]
    """Tells whether a header is that of the frame that is due."""
    return (
        load(head, 0, 4) == _MAGIC
        and head[4] == _KIND
        and load(head, 8, 8) == epoch
        and load(head, 16, 8) == number
        and load(head, 24, 8) == num_bytes
    )
