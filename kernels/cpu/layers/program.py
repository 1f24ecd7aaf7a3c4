"""Many pieces of compiled work in one go: a team of threads runs them one after the other, and Python waits once.

Between two calls of Python the threads of a team have nothing to do, and every thread that sleeps has to be woken. A
decoder's step is some 300 calls; as one program it is one.
"""

import ctypes
import struct
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.layers import program_ir
from kernels.cpu.layers.program_ir import PROGRAM
from kernels.cpu.machine import machine_code, threads
from kernels.cpu.rows.rows_ir import HEADER, norm

_LINE_WORDS = 8  # of a cache line, 64 bytes


class Program:
    """Works with their jobs, in the order in which they run.

    A job is the bytes of a work's arguments, in which addresses are those of memory that the caller keeps.
    """

    def __init__(self, max_works: int) -> None:
        """Room for ``max_works``."""
        self._works: list[tuple[int, NDArray[np.uint8]]] = []
        self._tickets = _lines(max_works)
        self._num_tickets = 0
        self._counters = _lines(3)  # of a barrier two; the third is always 0
        self._list = np.zeros((max_works, 2), np.int64)

    def ticket(self) -> int:
        """Address of a counter that is 0 whenever the program begins, for one work's threads to share it by."""
        assert self._num_tickets < len(self._tickets), "more tickets than works"
        self._num_tickets += 1
        return int(self._tickets[self._num_tickets - 1 :].ctypes.data)

    def add(self, work: int, job: bytes) -> int:
        """Appends the C function at ``work``; its number, for :meth:`change`."""
        number = len(self._works)
        memory = np.frombuffer(job, np.uint8).copy()
        self._works.append((work, memory))
        self._list[number] = work, memory.ctypes.data
        return number

    def change(self, number: int, job: bytes) -> None:
        """Other arguments for a work, as many bytes as before."""
        self._works[number][1][:] = np.frombuffer(job, np.uint8)

    def __len__(self) -> int:
        """Works so far."""
        return len(self._works)

    def run(self, num_threads: int, start: int = 0, stop: int | None = None, *, ended_by: int = 0) -> None:
        """The works from ``start`` up to ``stop``, or all, by ``num_threads`` threads.

        Releases the interpreter's lock.

        Args:
            ended_by: address of a word that is not 0 once a work wants those after it to be left out; 0: none does.
        """
        self._tickets[: self._num_tickets] = 0
        self._counters[:] = 0
        *counters, never = (row.ctypes.data for row in self._counters)
        team_size = threads.team_size() if num_threads > 1 else 0
        count = (len(self._works) if stop is None else stop) - start
        functions = team_size, *_rests()
        header = _HEADER.pack(count, self._list[start:].ctypes.data, *counters, *functions, ended_by or never)
        threads.run(compiled()["program"], header, num_threads)


def _lines(count: int) -> NDArray[np.int64]:
    """Zeros [count, 8], one cache line each: all threads write to the first of its words."""
    words = np.zeros((count + 1) * _LINE_WORDS, np.int64)
    start = -words.ctypes.data // words.itemsize % _LINE_WORDS
    return words[start : start + count * _LINE_WORDS].reshape(count, _LINE_WORDS)


_HEADER = struct.Struct(f"={len(PROGRAM)}q")


@cache
def compiled() -> dict[str, int]:
    """Where the code is, by name."""
    norms = norm("norm", adds=False, wide=False) + norm("norm_wide", adds=False, wide=True)
    ir = HEADER + norms + program_ir.turn() + program_ir.tiles() + program_ir.zeros() + program_ir.program()
    return machine_code.addresses(ir, ["program", "tiles_work", "turn_work", "turn_wide_work", "zeros_work"])


def tiles(
    x: int, output: int, *, num_tokens: int, num_pairs: int, shape: tuple[int, int], num_threads: int, ticket: int
) -> tuple[int, bytes]:
    """The work that lays rows [T, I / 2] of 32 bits out as a product reads them, and its job.

    Args:
        x: address of the rows.
        output: address of as many tiles as ``shape`` says, and as many rows of each.
        num_tokens: T.
        num_pairs: I / 2, whole vectors.
        shape: tiles, and rows of each.
        num_threads: that share the work.
        ticket: address of a zero.
    """
    num_tiles, num_rows = shape
    num_chunks = -(-num_pairs // program_ir.CHUNK_PAIRS)
    num_blocks = num_tiles * num_chunks
    unit = -(-num_blocks // num_threads)
    return work("tiles_work", ticket, num_blocks, unit, x, output, num_tokens, num_rows, num_pairs, num_chunks)


def work(name: str, *arguments: int) -> tuple[int, bytes]:
    """A work of :mod:`kernels.cpu.layers.program_ir` by its name, and the job of its arguments."""
    return compiled()[name], struct.pack(f"={len(arguments)}q", *arguments)


@cache
def _rests() -> tuple[int, int]:
    """Addresses of ``sched_yield`` and ``usleep``, which let another thread have the core."""
    library = ctypes.CDLL(None)
    return threads.address(library.sched_yield), threads.address(library.usleep)
