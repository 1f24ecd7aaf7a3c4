"""Programs: sequences of compiled operations that a team of threads runs in one call from Python.

Between two calls from Python the threads of a team idle, and threads that sleep must be woken. A decoder's step is some
300 operations, which one program runs in a single call.
"""

import ctypes
import struct
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.layers import layer_ir, program_ir
from kernels.cpu.layers.program_ir import PROGRAM
from kernels.cpu.machine import machine_code, threads
from kernels.cpu.machine.target import Target, chosen
from kernels.cpu.machine.threads import Operation
from kernels.cpu.rows.rows_ir import HEADER, norm

_LINE_WORDS = 8  # words of a cache line of 64 bytes

# How often threads spin at a barrier, some 10 ns each, until :func:`set_spins` says otherwise: longer than the others
# usually take, and shorter than it takes to sleep and be woken.
_spins = 2000


def set_spins(count: int) -> None:
    """Sets how often each thread spins at a barrier before it yields its core, in programs that run from now on."""
    global _spins
    assert count >= 0, count
    _spins = count


class Program:
    """Operations in the order in which they run.

    The caller keeps the memory whose addresses are among an operation's arguments.
    """

    def __init__(self, max_operations: int) -> None:
        """Makes an empty program, to which ``max_operations`` can be added."""
        self._arguments: list[NDArray[np.uint8]] = []
        self._tickets = _lines(max_operations)
        self._num_tickets = 0
        self._counters = _lines(3)  # two for the barrier; the third is always 0
        self._operations = np.zeros((max_operations, 2), np.int64)  # address of the function, and of its arguments

    def ticket(self) -> int:
        """Returns the address of a new counter, by which threads share an operation; each run begins with it at 0."""
        assert self._num_tickets < len(self._tickets), "more tickets than operations"
        self._num_tickets += 1
        return int(self._tickets[self._num_tickets - 1 :].ctypes.data)

    def add(self, function: int, arguments: bytes) -> int:
        """Appends an operation, of the C function at an address; returns its number for :meth:`change`."""
        number = len(self._arguments)
        memory = np.frombuffer(arguments, np.uint8).copy()
        self._arguments.append(memory)
        self._operations[number] = function, memory.ctypes.data
        return number

    def change(self, number: int, arguments: bytes) -> None:
        """Replaces the arguments of an operation by as many bytes."""
        self._arguments[number][:] = np.frombuffer(arguments, np.uint8)

    def __len__(self) -> int:
        """Returns the number of operations."""
        return len(self._arguments)

    def run(self, num_threads: int, start: int = 0, stop: int | None = None, *, ended_by: int = 0) -> None:
        """Runs the operations from ``start`` to ``stop``, or all, on ``num_threads`` threads.

        It releases the interpreter's lock.

        Args:
            ended_by: the address of a word that an operation sets to skip those after it; 0: none does.
        """
        self._tickets[: self._num_tickets] = 0
        self._counters[:] = 0
        *counters, never = (row.ctypes.data for row in self._counters)
        team_size = threads.team_size() if num_threads > 1 else 0
        count = (len(self._arguments) if stop is None else stop) - start
        functions = team_size, *_yield_and_sleep()
        header = _HEADER.pack(
            count, self._operations[start:].ctypes.data, *counters, *functions, ended_by or never, _spins
        )
        threads.run(compiled()["program"], header, num_threads)


def _lines(count: int) -> NDArray[np.int64]:
    """Allocates zeros [count, 8], a cache line each, since all threads write to the first word of each."""
    words = np.zeros((count + 1) * _LINE_WORDS, np.int64)
    start = -words.ctypes.data // words.itemsize % _LINE_WORDS
    return words[start : start + count * _LINE_WORDS].reshape(count, _LINE_WORDS)


_HEADER = struct.Struct(f"={len(PROGRAM)}q")


NAMES = ("program", "pack_tiles", "pack_wide_tiles", "rotate_rows", "rotate_wide_rows", "fill_zeros")


@cache
def compiled() -> dict[str, int]:
    """Compiles the functions and returns their addresses by name."""
    return machine_code.addresses(module(chosen()), list(NAMES))


def module(target: Target) -> str:
    """Returns the LLVM IR of the functions ``NAMES``."""
    norms = norm(target, "norm", adds=False, wide=False) + norm(target, "norm_wide", adds=False, wide=True)
    packs = layer_ir.pack_tiles(widens=False) + layer_ir.pack_tiles(widens=True)
    layers = layer_ir.HEADER + layer_ir.rotate(target) + packs + layer_ir.fill_zeros()
    return HEADER + norms + layers + program_ir.program(target)


def pack_tiles(
    x: int,
    output: int,
    *,
    num_tokens: int,
    num_pairs: int,
    shape: tuple[int, int],
    num_threads: int,
    ticket: int,
    widens: bool,
) -> Operation:
    """Makes the operation that lays rows [T, I / 2] of pairs of bfloat16 out as a product reads them.

    Args:
        x: the address of the rows.
        output: the address of the tiles.
        num_tokens: T.
        num_pairs: I / 2, which must be whole vectors.
        shape: the number of tiles, and the rows of each.
        num_threads: how many threads share it.
        ticket: the address of a zero.
        widens: whether the product reads float32.
    """
    num_tiles, num_rows = shape
    num_chunks = -(-num_pairs // layer_ir.CHUNK_PAIRS)
    num_blocks = num_tiles * num_chunks
    unit = -(-num_blocks // num_threads)
    name = "pack_wide_tiles" if widens else "pack_tiles"
    return operation(name, ticket, num_blocks, unit, x, output, num_tokens, num_rows, num_pairs, num_chunks)


def operation(name: str, *arguments: int) -> Operation:
    """Makes an operation of a function of :mod:`kernels.cpu.layers.layer_ir`, given its name and arguments."""
    return compiled()[name], struct.pack(f"={len(arguments)}q", *arguments)


@cache
def _yield_and_sleep() -> tuple[int, int]:
    """Returns the addresses of ``sched_yield`` and ``usleep``, which let another thread have the core."""
    library = ctypes.CDLL(None)
    return threads.address(library.sched_yield), threads.address(library.usleep)
