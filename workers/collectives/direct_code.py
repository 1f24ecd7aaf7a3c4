"""The direct all-reduce as compiled code, which needs no Python.

Every rank sends its tensor to all others, in the frames of :mod:`workers.transport.frames`, and adds once it has all
parts. An error ends the all-reduce and the program that it is an operation of; the shared state tells which error.

Between products whose weights fill the caches, each line of Python waits for memory. With all-reduces of 32 KB run by
Python, the slower of two hosts spent half of a step of 8 decodes outside of compiled code; with this it spends a sixth.
"""

# mypy: disallow-untyped-decorators=False, disallow-any-unimported=False

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from kernels.cpu.attention import intrinsics
from kernels.cpu.attention.intrinsics import pointer, take_ticket
from kernels.cpu.machine.numba_code import c_function
from workers.collectives import direct_words as w
from workers.transport import checksum_ir, frame_code, frames
from workers.transport.frame_code import (
    bytes_at,
    call_four,
    frame_checksum,
    is_due,
    load,
    store,
    words_at,
    write_header,
)
from workers.transport.frames import FIELD_BYTES, HEADER_BYTES

WAIT_MS = 100
"""How long the code waits before it asks ``on_wait`` whether to wait on."""

_NUM_IOVECS = 3  # the word of a struct msghdr that has the number of its iovecs

_FLAGS = 0x4000 | 0x40  # MSG_NOSIGNAL, MSG_DONTWAIT
_AGAIN, _INTERRUPTED = 11, 4
_POLLIN, _POLLOUT = 1, 4
_MONOTONIC = 1

_send = types.ExternalFunction("sendmsg", types.int64(types.int32, types.int64, types.int32))
_receive = types.ExternalFunction("recv", types.int64(types.int32, types.int64, types.int64, types.int32))
_poll = types.ExternalFunction("poll", types.int32(types.int64, types.uint64, types.int32))
_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_errno_at = types.ExternalFunction("__errno_location", types.int64())
_jit = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **frame_code.OPTIONS)


@intrinsic
def call_wait(context, function, waited_ms):  # type: ignore[no-untyped-def]
    """Calls ``int32 function(int64)``."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int32(types.int64, types.int64), generate


@_jit
def _fail(state, status, peer, error):  # type: ignore[no-untyped-def]
    """Notes an error in the state."""
    state[w.STATUS], state[w.AWAITED], state[w.ERROR] = status, peer, error


@_jit
def _errno():  # type: ignore[no-untyped-def]
    return np.int64(carray(pointer(_errno_at(), np.int32(0)), 1)[0])


@_jit
def _is_retried(state, i):  # type: ignore[no-untyped-def]
    """Tells whether a failed system call is to be made again at once. Notes a broken connection in the state."""
    error = _errno()
    if error != _AGAIN and error != _INTERRUPTED:
        _fail(state, w.BROKEN, i, error)
    return error == _INTERRUPTED


@_jit
def _now_ms():  # type: ignore[no-untyped-def]
    time = np.empty(2, np.int64)
    _clock(np.int32(_MONOTONIC), time.ctypes.data)
    return 1000 * time[0] + time[1] // 1_000_000


@_jit
def _begin(state, peers, args):  # type: ignore[no-untyped-def]
    """Prepares the tile's frame for each peer, of which nothing is sent yet."""
    number = args[w.TILE]
    payload_bytes = args[w.ROWS] * args[w.ROW_BYTES]
    for i in range(len(peers)):
        peer = peers[i]
        if number == 0:
            peer[w.SENT] = 0
            peer[w.RECEIVED] = 0
        head = bytes_at(peer[w.HEADS] + number * w.HEAD_STRIDE, HEADER_BYTES)
        write_header(head, state[w.EPOCH], peer[w.NUM_SENT] + number, payload_bytes)
        start = args[w.TENSOR] + number * args[w.ROW_BYTES]
        checksum = frame_checksum(
            head, start, args[w.ROWS], args[w.ROW_BYTES], args[w.STRIDE], state[w.FOLD], state[w.TABLE]
        )
        store(head, FIELD_BYTES, checksum, 4)


@_jit
def _fill_message(peer, args, number, offset):  # type: ignore[no-untyped-def]
    """Fills the peer's message with what follows ``offset`` bytes of a frame."""
    iovecs = words_at(peer[w.IOVECS], (args[w.ROWS] + 1, 2))
    count = 0
    if offset < HEADER_BYTES:
        iovecs[0, 0], iovecs[0, 1] = peer[w.HEADS] + number * w.HEAD_STRIDE + offset, HEADER_BYTES - offset
        count, offset = 1, HEADER_BYTES
    row = (offset - HEADER_BYTES) // args[w.ROW_BYTES]
    skip = (offset - HEADER_BYTES) % args[w.ROW_BYTES]
    start = args[w.TENSOR] + number * args[w.ROW_BYTES]
    while row < args[w.ROWS]:
        iovecs[count, 0], iovecs[count, 1] = start + row * args[w.STRIDE] + skip, args[w.ROW_BYTES] - skip
        count, row, skip = count + 1, row + 1, 0
    words_at(peer[w.MESSAGE], _NUM_IOVECS + 1)[_NUM_IOVECS] = count


@_jit
def _send_more(state, peers, i, args):  # type: ignore[no-untyped-def]
    """Sends what the socket takes of the tiles so far, and tells whether they are sent whole."""
    peer = peers[i]
    whole = HEADER_BYTES + args[w.ROWS] * args[w.ROW_BYTES]
    while peer[w.SENT] < (args[w.TILE] + 1) * whole:
        _fill_message(peer, args, peer[w.SENT] // whole, peer[w.SENT] % whole)
        sent = _send(np.int32(peer[w.SOCKET]), peer[w.MESSAGE], np.int32(_FLAGS))
        if sent >= 0:
            peer[w.SENT] += sent
        elif not _is_retried(state, i):
            return False
    return True


@_jit
def _is_whole(state, head, payload, num_bytes):  # type: ignore[no-untyped-def]
    """Tells whether the checksum of a received frame is right."""
    checksum = frame_checksum(head, payload, np.int64(1), num_bytes, np.int64(0), state[w.FOLD], state[w.TABLE])
    return checksum == load(head, FIELD_BYTES, 4)


@_jit
def _receive_more(state, peers, i, args):  # type: ignore[no-untyped-def]
    """Receives what has come, and tells whether all tiles are there. Notes a wrong frame in the state."""
    peer = peers[i]
    payload_bytes = args[w.ROWS] * args[w.ROW_BYTES]
    whole = HEADER_BYTES + payload_bytes
    while peer[w.RECEIVED] < args[w.NUM_TILES] * whole:
        number, done = peer[w.RECEIVED] // whole, peer[w.RECEIVED] % whole
        frame = peer[w.FRAMES] + number * args[w.FRAME_STRIDE]
        received = _receive(np.int32(peer[w.SOCKET]), frame + done, whole - done, np.int32(_FLAGS))
        if received == 0:
            _fail(state, w.CLOSED, i, np.int64(0))
            return False
        if received > 0:
            peer[w.RECEIVED] += received
            has_head = done < HEADER_BYTES and done + received >= HEADER_BYTES
            head = bytes_at(frame, HEADER_BYTES)
            if has_head and not is_due(head, state[w.EPOCH], peer[w.NUM_RECEIVED] + number, payload_bytes):
                state[w.AT] = number * args[w.FRAME_STRIDE]
                _fail(state, w.NOT_DUE, i, number)
                return False
            if done + received == whole and not _is_whole(state, head, frame + HEADER_BYTES, payload_bytes):
                _fail(state, w.DAMAGED, i, number)
                return False
        elif not _is_retried(state, i):
            return False
    return True


@_jit
def _advance(state, peers, args):  # type: ignore[no-untyped-def]
    """Sends and receives what all sockets allow now, and returns how many peers are to be waited for."""
    whole = HEADER_BYTES + args[w.ROWS] * args[w.ROW_BYTES]
    polls = words_at(state[w.POLLS], len(peers))
    num_waiting = 0
    for i in range(len(peers)):
        is_sent = _send_more(state, peers, i, args)
        is_there = peers[i, w.RECEIVED] >= args[w.NUM_TILES] * whole
        if state[w.STATUS] == w.OK and not is_there:
            is_there = _receive_more(state, peers, i, args)
        if state[w.STATUS] != w.OK:
            return 0
        if not (is_sent and is_there):
            if num_waiting == 0:
                state[w.AWAITED] = i
            events = (0 if is_sent else _POLLOUT) | (0 if is_there else _POLLIN)
            polls[num_waiting] = peers[i, w.SOCKET] | (np.int64(events) << 32)
            num_waiting += 1
    return num_waiting


@_jit
def _finish(state, peers, args):  # type: ignore[no-untyped-def]
    """Sends and receives until all tiles are there at both ends, or an error ends it."""
    began_ms = asked_ms = _now_ms()
    while True:
        num_waiting = _advance(state, peers, args)
        if num_waiting == 0:
            return
        _poll(state[w.POLLS], np.uint64(num_waiting), np.int32(WAIT_MS))
        now_ms = _now_ms()
        if now_ms - asked_ms >= WAIT_MS:
            asked_ms = now_ms
            if call_wait(state[w.ON_WAIT], now_ms - began_ms) != 0:
                state[w.STATUS] = w.GAVE_UP
                return


@_jit
def _sum(state, peers, args):  # type: ignore[no-untyped-def]
    """Adds the parts of all ranks in rank order, in place of this rank's own part."""
    parts = words_at(state[w.PARTS], len(peers) + 1)
    for number in range(args[w.NUM_TILES]):
        for row in range(args[w.ROWS]):
            for i in range(len(peers)):
                frame = peers[i, w.FRAMES] + number * args[w.FRAME_STRIDE]
                parts[i if i < args[w.OWN_PART] else i + 1] = frame + HEADER_BYTES + row * args[w.ROW_BYTES]
            here = args[w.TENSOR] + row * args[w.STRIDE] + number * args[w.ROW_BYTES]
            parts[args[w.OWN_PART]] = here
            call_four(args[w.ADD], state[w.PARTS], np.int64(len(parts)), here, args[w.COUNT])


@_jit
def _run(state, peers, args):  # type: ignore[no-untyped-def]
    """Starts the all-reduce of a tile; with the last tile, completes that of all tiles."""
    _begin(state, peers, args)
    if args[w.TILE] + 1 < args[w.NUM_TILES]:
        _advance(state, peers, args)
        return
    _finish(state, peers, args)
    if state[w.STATUS] == w.OK:
        for i in range(len(peers)):
            peers[i, w.NUM_SENT] += args[w.NUM_TILES]
            peers[i, w.NUM_RECEIVED] += args[w.NUM_TILES]
        _sum(state, peers, args)


def _entry(version: int) -> Callable[[Any], None]:
    """Makes the function that is compiled; ``version`` is part of its closure, by which Numba's cache knows it."""

    def all_reduce(at):  # type: ignore[no-untyped-def]
        if version >= 0:
            args = carray(at, w.ARGUMENT_WORDS)
            state = words_at(args[w.STATE], w.STATE_WORDS)
            if take_ticket(args[w.TICKET]) == 0 and state[w.STATUS] == w.OK:
                _run(state, words_at(state[w.PEERS], (state[w.NUM_PEERS], w.PEER_WORDS)), args)

    return all_reduce


@cache
def compiled() -> int:
    """Returns the address of the compiled function, a C function of the address of its arguments."""
    sources = (__file__, w.__file__, frame_code.__file__, frames.__file__, checksum_ir.__file__, intrinsics.__file__)
    return c_function(types.void(types.CPointer(types.int64)), _entry, sources)
