"""The direct all-reduce by compiled code, called from Python or as operations of a compiled program."""

import ctypes
import math
import os
import struct
import time
import weakref
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.layers.partial import MOST_COLUMN_TILES
from kernels.cpu.machine import machine_code, threads
from kernels.cpu.machine.columns_ir import WHOLE, ColumnTile
from kernels.cpu.machine.target import has
from placement.errors import HeterodyneError
from workers.collectives import add_ir, direct_code
from workers.collectives import direct_words as words
from workers.transport import checksum_ir, frame_code
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import HEADER_BYTES, Kind, parse
from workers.transport.link import Link, broken

MOST_BYTES = 4 << 20
"""The largest tensor: for larger ones the cost of Python is small beside the time that sending takes."""

_NUMBERS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_ARGUMENTS = struct.Struct(f"={words.ARGUMENT_WORDS}q")
_WAIT = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64)
_CACHE_LINE = 64
_TILE_COLUMNS = 32  # a tile has a whole number of vectors of so many columns
_MOST_ROWS = 256  # of a tensor in several tiles, since a message has at most 1024 iovecs


@cache
def _adds() -> dict[str, int]:
    """Returns the addresses of the functions that add, by name."""
    return machine_code.addresses(add_ir.module(), list(add_ir.NAMES.values()))


@cache
def _fold() -> int:
    """Returns the address of the function that folds checksums; 0 where the CPU has no instruction for it."""
    if not has(checksum_ir.FEATURE):
        return 0
    return machine_code.addresses(checksum_ir.fold(), [checksum_ir.NAME])[checksum_ir.NAME]


class CompiledAllReduce:
    """A compiled :func:`workers.collectives.algorithms.direct`, with the same frames and the same bits.

    For the thread that executes steps or its background thread. Implements :class:`kernels.cpu.layers.partial.SumWork`.
    """

    def __init__(
        self,
        *,
        rank: int,
        links: Mapping[int, Link],
        timeout_s: float,
        num_tiles: Callable[[int], int] = lambda _: 1,
        alive: Callable[[], None],
        reason: Callable[[PeerFailed], PeerFailed] = lambda error: error,
    ) -> None:
        """Sets the memory of the compiled code up. Raises PeerFailed.

        Args:
            rank: the number of this rank in the group.
            links: the links to all others, by rank.
            timeout_s: how long an all-reduce within a program may take.
            num_tiles: gives, for a tensor's bytes, the number of column tiles in which its all-reduce is fastest.
            alive: raises where a rank is known to be lost; is called about every 0.1 s while a program waits.
            reason: finds out why a connection broke.
        """
        self._links = [links[peer] for peer in sorted(links)]
        self._program_limits = timeout_s, alive
        self._wanted_tiles = num_tiles
        self._rank, self._reason = rank, reason
        self._wait_error: BaseException | None = None
        self._limits = timeout_s, alive  # those of what runs now
        self._add = _adds()
        self._on_wait = _WAIT(self._must_stop)  # must live as long as the code may call it
        self._table = frame_code.checksum_table()
        self._parts = np.zeros(len(self._links) + 1, np.int64)
        self._polls = np.zeros(len(self._links), np.int64)
        self._iovecs = np.zeros((len(self._links), _MOST_ROWS + 1, 2), np.int64)
        self._messages = np.zeros((len(self._links), 7), np.int64)
        self._heads = np.zeros((len(self._links), MOST_COLUMN_TILES, words.HEAD_STRIDE), np.uint8)
        self._frames: list[NDArray[np.uint8]] = []
        self._frame_bytes = 0
        self._ticket = np.zeros(1, np.int64)
        self._peers = np.zeros((len(self._links), words.PEER_WORDS), np.int64)
        self._state = np.zeros(words.STATE_WORDS, np.int64)
        self._set_up()

    @property
    def function(self) -> int:
        """Returns the address of the code."""
        return direct_code.compiled()

    @property
    def failed(self) -> int:
        """Returns the address of the word that is not 0 once an all-reduce has failed."""
        return int(self._state[words.STATUS :].ctypes.data)

    @property
    def has_failed(self) -> bool:
        """Tells whether an all-reduce has failed since the run began."""
        return bool(self._state[words.STATUS])

    def can_sum(self, x: Tensor) -> bool:
        """Tells whether the code can sum a tensor of this size, dtype and device."""
        return x.dtype in _NUMBERS and 0 < x.nbytes <= MOST_BYTES and x.is_contiguous() and x.device.type == "cpu"

    def num_column_tiles(self, x: Tensor) -> int:
        """Implements :meth:`kernels.cpu.layers.partial.SumWork.num_column_tiles`, in whole vectors of outputs."""
        if len(x) > _MOST_ROWS:
            return 1
        columns = x.shape[1] // _TILE_COLUMNS
        return math.gcd(self._wanted_tiles(x.nbytes), columns) if x.shape[1] % _TILE_COLUMNS == 0 else 1

    def arguments(self, x: Tensor, ticket: int, tile: ColumnTile = WHOLE) -> bytes:
        """Implements :meth:`kernels.cpu.layers.partial.SumWork.arguments`; the caller keeps the contiguous ``x``."""
        assert self.can_sum(x) and tile.count <= MOST_COLUMN_TILES, (x.dtype, x.shape, tile)
        assert tile.count == 1 or (len(x) <= _MOST_ROWS and x.shape[1] % tile.count == 0), (x.shape, tile)
        rows = 1 if tile.count == 1 else len(x)
        stride = x.nbytes // rows
        row_bytes = stride // tile.count
        frame_stride = -(-(HEADER_BYTES + rows * row_bytes) // _CACHE_LINE) * _CACHE_LINE
        self._reserve(frame_stride * tile.count)
        add = self._add[add_ir.NAMES[_NUMBERS[x.dtype]]]
        return _ARGUMENTS.pack(
            *(ticket, self._state.ctypes.data, x.data_ptr(), rows, stride),
            *(tile.number, tile.count, row_bytes, add, row_bytes // x.itemsize, self._rank, frame_stride),
        )

    def all_reduce(self, x: Tensor, *, deadline_s: float, alive: Callable[[], None]) -> None:
        """Sums a tensor that it can sum (:meth:`can_sum`) over the ranks, in place.

        Args:
            deadline_s: the end of the wait on the clock of :func:`time.monotonic`.
            alive: raises where a rank is known to be lost.

        Raises:
            PeerFailed: a connection broke, or the all-reduce is not done by the deadline.
            BadFrame: a received frame is not the one that was due.
        """
        self._ticket[0] = 0
        arguments = self.arguments(x, int(self._ticket.ctypes.data))
        self.begin()
        self._limits = deadline_s - time.monotonic(), alive
        threads.run(self.function, arguments, 1)
        self._check()

    def wait_at_most(self, timeout_s: float) -> None:
        """Sets how long an all-reduce may take within the programs that begin from now on."""
        self._program_limits = timeout_s, self._program_limits[1]

    def release(self) -> None:
        """Frees the memory for frames. Not while there are arguments that are still to be used."""
        self._frames, self._frame_bytes = [], 0

    def begin(self) -> None:
        """Prepares for a program; reads the frame numbers, since others may have used the connections."""
        self._limits = self._program_limits
        for peer, link in zip(self._peers, self._links, strict=True):
            peer[words.NUM_SENT], peer[words.NUM_RECEIVED] = link.num_sent, link.num_received

    def end(self) -> None:
        """Ends a program. Raises PeerFailed and BadFrame where an all-reduce has failed."""
        try:
            self._check()
        except PeerFailed as error:
            raise self._reason(error) from error

    def _check(self) -> None:
        """Writes the frame numbers back, and raises the error that the state tells of, if any."""
        for peer, link in zip(self._peers, self._links, strict=True):
            link.num_sent, link.num_received = int(peer[words.NUM_SENT]), int(peer[words.NUM_RECEIVED])
        status, place = int(self._state[words.STATUS]), int(self._state[words.AWAITED])
        if status == words.OK:
            return
        if status == words.GAVE_UP:
            assert self._wait_error is not None
            raise self._wait_error
        raise self._error(status, place)

    def _error(self, status: int, place: int) -> HeterodyneError:
        """Makes the error of a status other than OK, given the index of the peer."""
        link = self._links[place]
        if status == words.BROKEN:
            code = int(self._state[words.ERROR])
            return broken(link, OSError(code, os.strerror(code)))
        if status == words.CLOSED:
            return PeerFailed.closed(link.peer)
        if status == words.DAMAGED:
            return BadFrame("a TENSOR frame is damaged (checksum)")
        number, start = int(self._state[words.ERROR]), int(self._state[words.AT])
        head = self._frames[place][start : start + HEADER_BYTES].tobytes()
        header = parse(head, epoch=link.epoch, number=link.num_received + number)
        if header.kind is Kind.FAILED:
            return PeerFailed(link.peer, "says that it has failed")
        if header.kind is not Kind.TENSOR:
            return BadFrame.unexpected(header.kind.name, Kind.TENSOR.name)
        return BadFrame(f"a TENSOR frame has {header.length} bytes, which is not what was due")

    def _must_stop(self, waited_ms: int) -> int:
        """Tells the code, which calls it while it waits, whether to stop: 1 or 0."""
        timeout_s, alive = self._limits
        try:
            alive()
            if waited_ms >= 1000 * timeout_s:
                place = int(self._state[words.AWAITED])
                raise PeerFailed.timed_out(self._links[place].peer)
        except BaseException as error:  # raised once the code has returned
            self._wait_error = error
            return 1
        return 0

    def _set_up(self) -> None:
        """Writes the words that stay the same: those of the peers and of the state."""
        for place, link in enumerate(self._links):
            peer, message = self._peers[place], self._messages[place]
            peer[words.SOCKET] = self._own_socket(link)
            peer[words.HEADS] = self._heads[place].ctypes.data
            peer[words.MESSAGE] = message.ctypes.data
            peer[words.IOVECS] = self._iovecs[place].ctypes.data
            message[2] = self._iovecs[place].ctypes.data  # msg_iov
        state = self._state
        state[words.NUM_PEERS] = len(self._links)
        state[words.EPOCH] = self._links[0].epoch
        state[words.ON_WAIT] = threads.address(self._on_wait)
        state[words.FOLD] = _fold()
        state[words.TABLE] = self._table.ctypes.data
        state[words.PEERS] = self._peers.ctypes.data
        state[words.POLLS] = self._polls.ctypes.data
        state[words.PARTS] = self._parts.ctypes.data

    def _own_socket(self, link: Link) -> int:
        """Duplicates a link's socket number, so that no other file gets the number while the code uses it."""
        try:
            number = os.dup(link.socket.fileno())
        except OSError as error:
            raise broken(link, error) from error
        weakref.finalize(self, os.close, number)
        return number

    def _reserve(self, num_bytes: int) -> None:
        """Allocates memory for the frames from each peer, whose payloads begin at cache lines."""
        if num_bytes <= self._frame_bytes:
            return
        self._frame_bytes = num_bytes
        self._frames = []
        for peer in self._peers:
            memory = np.zeros(num_bytes + _CACHE_LINE, np.uint8)
            start = -(memory.ctypes.data + HEADER_BYTES) % _CACHE_LINE
            self._frames.append(memory[start:])
            peer[words.FRAMES] = self._frames[-1].ctypes.data
