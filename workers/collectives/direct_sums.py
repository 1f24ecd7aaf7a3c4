"""Sums over the ranks of a stage by compiled code: from Python, or as works of a program that goes on by itself."""

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

from kernels.cpu.layers.partial import MOST_STRIPS
from kernels.cpu.machine import machine_code, threads
from kernels.cpu.machine.columns_ir import WHOLE, Strip
from workers.collectives import add_ir, direct_code
from workers.collectives import direct_words as words
from workers.transport import checksum_ir, frame_code
from workers.transport.errors import BadFrame, PeerFailed
from workers.transport.frames import HEADER_BYTES, Kind, parse
from workers.transport.link import Link, broken

MOST_BYTES = 4 << 20
"""Of a tensor: what Python costs larger ones is little beside what they take to send."""

_NUMBERS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_JOB = struct.Struct(f"={words.JOB_WORDS}q")
_WAIT = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64)
_CACHE_LINE = 64
_STRIP_COLUMNS = 32  # a strip has whole vectors of them
_MOST_ROWS = 256  # in strips: a message has at most 1024 pieces


@cache
def _adds() -> dict[str, int]:
    return machine_code.addresses(add_ir.module(), list(add_ir.NAMES.values()))


@cache
def _fold() -> int:
    return machine_code.addresses(checksum_ir.fold(), [checksum_ir.NAME])[checksum_ir.NAME]


def is_available() -> bool:
    """Whether this CPU has what the code needs."""
    return checksum_ir.FEATURE in machine_code.cpu_features()


class DirectSums:
    """The direct exchange of :func:`workers.collectives.algorithms.direct`: the same frames, the same bits.

    For the thread that executes steps, or the one beside it. A :class:`kernels.cpu.layers.partial.SumWork`.
    """

    def __init__(
        self,
        *,
        rank: int,
        links: Mapping[int, Link],
        timeout_s: float,
        strips: Callable[[int], int] = lambda _: 1,
        alive: Callable[[], None],
        reason: Callable[[PeerFailed], PeerFailed] = lambda error: error,
    ) -> None:
        """Of the ranks of a group, where :func:`is_available`.

        Args:
            rank: of this one, in the group.
            links: to all others.
            timeout_s: longest that a sum of a program may take.
            strips: in how many a tensor of so many bytes is summed best.
            alive: raises where a rank is known to be lost; called about every 0.1 s of a program's wait.
            reason: why a connection broke.

        Raises:
            PeerFailed: a link is closed.
        """
        self._rank = rank
        self._links = [links[peer] for peer in sorted(links)]
        self._each = timeout_s, alive  # what limits the sums of a program
        self._strips = strips
        self._reason = reason
        self._given_up: BaseException | None = None
        self._limits = timeout_s, alive  # what limits the sums that are on their way
        self._add = _adds()
        self._on_wait = _WAIT(self._is_to_end)  # must live as long as the code may call it
        self._table = frame_code.checksum_table()
        self._parts = np.zeros(len(self._links) + 1, np.int64)
        self._polls = np.zeros(len(self._links), np.int64)
        self._pieces = np.zeros((len(self._links), _MOST_ROWS + 1, 2), np.int64)
        self._messages = np.zeros((len(self._links), 7), np.int64)
        self._heads = np.zeros((len(self._links), MOST_STRIPS, words.HEAD_STRIDE), np.uint8)
        self._frames: list[NDArray[np.uint8]] = []
        self._room = 0
        self._ticket = np.zeros(1, np.int64)
        self._peers = np.zeros((len(self._links), words.PEER_WORDS), np.int64)
        self._state = np.zeros(words.STATE_WORDS, np.int64)
        self._set_up()

    @property
    def function(self) -> int:
        """Address of the code."""
        return direct_code.compiled()

    @property
    def failed(self) -> int:
        """Address of the word that is not 0 once a sum has failed."""
        return int(self._state[words.STATUS :].ctypes.data)

    def takes(self, x: Tensor) -> bool:
        """Whether it is a tensor of a kind and size that the code is for."""
        return x.dtype in _NUMBERS and 0 < x.nbytes <= MOST_BYTES and x.is_contiguous() and x.device.type == "cpu"

    def num_strips(self, x: Tensor) -> int:
        """As :class:`kernels.cpu.layers.partial.SumWork` says: as many as pay, of whole vectors of outputs."""
        if len(x) > _MOST_ROWS:
            return 1
        columns = x.shape[1] // _STRIP_COLUMNS
        return math.gcd(self._strips(x.nbytes), columns) if x.shape[1] % _STRIP_COLUMNS == 0 else 1

    def job(self, x: Tensor, ticket: int, strip: Strip = WHOLE) -> bytes:
        """As :class:`kernels.cpu.layers.partial.SumWork` says: ``x`` is contiguous memory that the caller keeps."""
        assert self.takes(x) and strip.count <= MOST_STRIPS, (x.dtype, x.shape, strip)
        assert strip.count == 1 or (len(x) <= _MOST_ROWS and x.shape[1] % strip.count == 0), (x.shape, strip)
        rows = 1 if strip.count == 1 else len(x)
        stride = x.nbytes // rows
        row_bytes = stride // strip.count
        frame_stride = -(-(HEADER_BYTES + rows * row_bytes) // _CACHE_LINE) * _CACHE_LINE
        self._reserve(frame_stride * strip.count)
        add = self._add[add_ir.NAMES[_NUMBERS[x.dtype]]]
        return _JOB.pack(
            *(ticket, self._state.ctypes.data, x.data_ptr(), rows, stride),
            *(strip.number, strip.count, row_bytes, add, row_bytes // x.itemsize, self._rank, frame_stride),
        )

    def all_reduce(self, x: Tensor, *, deadline_s: float, alive: Callable[[], None]) -> None:
        """Sums what it :meth:`takes` over the ranks, in place.

        Args:
            deadline_s: by :func:`time.monotonic`.
            alive: raises where a rank is known to be lost.

        Raises:
            PeerFailed: a connection broke, or the sum is not done by the deadline.
            BadFrame: what came is not what was due.
        """
        self._ticket[0] = 0
        job = self.job(x, int(self._ticket.ctypes.data))
        self.begin()
        self._limits = deadline_s - time.monotonic(), alive
        threads.run(self.function, job, 1)
        self._check()

    def release(self) -> None:
        """Lets the memory for frames go: not once there are jobs that are to run."""
        self._frames, self._room = [], 0

    def begin(self) -> None:
        """Before a program whose works sum: others may have used the connections."""
        self._limits = self._each
        for peer, link in zip(self._peers, self._links, strict=True):
            peer[words.NUM_SENT], peer[words.NUM_RECEIVED] = link.num_sent, link.num_received

    def end(self) -> None:
        """After it. Raises PeerFailed and BadFrame, where a sum has failed."""
        try:
            self._check()
        except PeerFailed as error:
            raise self._reason(error) from error

    def _check(self) -> None:
        for peer, link in zip(self._peers, self._links, strict=True):
            link.num_sent, link.num_received = int(peer[words.NUM_SENT]), int(peer[words.NUM_RECEIVED])
        status, place = int(self._state[words.STATUS]), int(self._state[words.AWAITED])
        if status == words.OK:
            return
        link = self._links[place]
        if status == words.GAVE_UP:
            assert self._given_up is not None
            raise self._given_up
        if status == words.BROKEN:
            code = int(self._state[words.ERROR])
            raise broken(link, OSError(code, os.strerror(code)))
        if status == words.CLOSED:
            raise PeerFailed(link.peer, "closed its connection")
        if status == words.DAMAGED:
            raise BadFrame("a TENSOR frame is damaged (checksum)")
        number, start = int(self._state[words.ERROR]), int(self._state[words.AT])
        head = self._frames[place][start : start + HEADER_BYTES].tobytes()
        header = parse(head, epoch=link.epoch, number=link.num_received + number)
        if header.kind is Kind.FAILED:
            raise PeerFailed(link.peer, "says that it has failed")
        if header.kind is not Kind.TENSOR:
            raise BadFrame(f"a {header.kind.name} frame came where a TENSOR was due")
        raise BadFrame(f"a TENSOR frame has {header.length} bytes, which is not what was due")

    def _is_to_end(self, waited_ms: int) -> int:
        """Called by the code while it waits: whether it is to end."""
        timeout_s, alive = self._limits
        try:
            alive()
            if waited_ms >= 1000 * timeout_s:
                place = int(self._state[words.AWAITED])
                raise PeerFailed(self._links[place].peer, "did not answer in time")
        except BaseException as error:  # raised once the code has returned
            self._given_up = error
            return 1
        return 0

    def _set_up(self) -> None:
        for place, link in enumerate(self._links):
            peer, message = self._peers[place], self._messages[place]
            peer[words.SOCKET] = self._own_socket(link)
            peer[words.HEADS] = self._heads[place].ctypes.data
            peer[words.MESSAGE] = message.ctypes.data
            peer[words.PIECES] = self._pieces[place].ctypes.data
            message[2] = self._pieces[place].ctypes.data  # msg_iov
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
        """The number of its connection that, while the code has it, no other file gets when the link is closed."""
        try:
            number = os.dup(link.socket.fileno())
        except OSError as error:
            raise broken(link, error) from error
        weakref.finalize(self, os.close, number)
        return number

    def _reserve(self, num_bytes: int) -> None:
        """Memory for all frames from each peer; payloads begin at cache lines."""
        if num_bytes <= self._room:
            return
        self._room = num_bytes
        self._frames = []
        for peer in self._peers:
            memory = np.zeros(num_bytes + _CACHE_LINE, np.uint8)
            start = -(memory.ctypes.data + HEADER_BYTES) % _CACHE_LINE
            self._frames.append(memory[start:])
            peer[words.FRAMES] = self._frames[-1].ctypes.data
