"""The direct exchange of a tensor between ranks, and its sum, as compiled code that needs no Python.

Every rank sends all to everyone, in the frames of :mod:`workers.transport.frames`, and adds what it has when it has
everything. What is not as it should be ends the exchange, and the program that it is a work of: the state says what.

Between products whose weights fill the caches, each line of Python waits for memory: with sums of 32 KB by Python, half
of the time of the slower of two hosts in a step of 8 decodes was not its compiled code's; with this, a sixth.
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
"""How long it waits before it asks ``on_wait`` whether to go on."""

_LENGTH = 3  # of a struct msghdr, in words: the number of its struct iovec

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
    """``int32 function(int64)``."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int32(types.int64, types.int64), generate


@_jit
def _fail(state, status, peer, error):  # type: ignore[no-untyped-def]
    state[w.STATUS], state[w.AWAITED], state[w.ERROR] = status, peer, error


@_jit
def _errno():  # type: ignore[no-untyped-def]
    return np.int64(carray(pointer(_errno_at(), np.int32(0)), 1)[0])


@_jit
def _goes_on(state, i):  # type: ignore[no-untyped-def]
    """Whether a system call that failed is to be made again at once; a broken connection is told in the state."""
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
def _begin(state, peers, job):  # type: ignore[no-untyped-def]
    """The strip's frame for each peer, none of which is sent yet."""
    number = job[w.STRIP]
    payload_bytes = job[w.ROWS] * job[w.ROW_BYTES]
    for i in range(len(peers)):
        peer = peers[i]
        if number == 0:
            peer[w.SENT] = 0
            peer[w.RECEIVED] = 0
        head = bytes_at(peer[w.HEADS] + number * w.HEAD_STRIDE, HEADER_BYTES)
        write_header(head, state[w.EPOCH], peer[w.NUM_SENT] + number, payload_bytes)
        start = job[w.X] + number * job[w.ROW_BYTES]
        checksum = frame_checksum(
            head, start, job[w.ROWS], job[w.ROW_BYTES], job[w.STRIDE], state[w.FOLD], state[w.TABLE]
        )
        store(head, FIELD_BYTES, checksum, 4)


@_jit
def _point(peer, job, number, offset):  # type: ignore[no-untyped-def]
    """Has the peer's message be what follows ``offset`` bytes of a frame."""
    pieces = words_at(peer[w.PIECES], (job[w.ROWS] + 1, 2))
    count = 0
    if offset < HEADER_BYTES:
        pieces[0, 0], pieces[0, 1] = peer[w.HEADS] + number * w.HEAD_STRIDE + offset, HEADER_BYTES - offset
        count, offset = 1, HEADER_BYTES
    row = (offset - HEADER_BYTES) // job[w.ROW_BYTES]
    skip = (offset - HEADER_BYTES) % job[w.ROW_BYTES]
    start = job[w.X] + number * job[w.ROW_BYTES]
    while row < job[w.ROWS]:
        pieces[count, 0], pieces[count, 1] = start + row * job[w.STRIDE] + skip, job[w.ROW_BYTES] - skip
        count, row, skip = count + 1, row + 1, 0
    words_at(peer[w.MESSAGE], _LENGTH + 1)[_LENGTH] = count


@_jit
def _send_more(state, peers, i, job):  # type: ignore[no-untyped-def]
    """Sends what can be sent now of the strips so far; whether that was all."""
    peer = peers[i]
    whole = HEADER_BYTES + job[w.ROWS] * job[w.ROW_BYTES]
    while peer[w.SENT] < (job[w.STRIP] + 1) * whole:
        _point(peer, job, peer[w.SENT] // whole, peer[w.SENT] % whole)
        sent = _send(np.int32(peer[w.SOCKET]), peer[w.MESSAGE], np.int32(_FLAGS))
        if sent >= 0:
            peer[w.SENT] += sent
        elif not _goes_on(state, i):
            return False
    return True


@_jit
def _is_whole(state, head, payload, num_bytes):  # type: ignore[no-untyped-def]
    """Whether a frame that has come is what was sent."""
    checksum = frame_checksum(head, payload, np.int64(1), num_bytes, np.int64(0), state[w.FOLD], state[w.TABLE])
    return checksum == load(head, FIELD_BYTES, 4)


@_jit
def _receive_more(state, peers, i, job):  # type: ignore[no-untyped-def]
    """Receives what has come; whether that was all strips, and as they should be."""
    peer = peers[i]
    payload_bytes = job[w.ROWS] * job[w.ROW_BYTES]
    whole = HEADER_BYTES + payload_bytes
    while peer[w.RECEIVED] < job[w.NUM_STRIPS] * whole:
        number, done = peer[w.RECEIVED] // whole, peer[w.RECEIVED] % whole
        frame = peer[w.FRAMES] + number * job[w.FRAME_STRIDE]
        received = _receive(np.int32(peer[w.SOCKET]), frame + done, whole - done, np.int32(_FLAGS))
        if received == 0:
            _fail(state, w.CLOSED, i, np.int64(0))
            return False
        if received > 0:
            peer[w.RECEIVED] += received
            has_head = done < HEADER_BYTES and done + received >= HEADER_BYTES
            head = bytes_at(frame, HEADER_BYTES)
            if has_head and not is_due(head, state[w.EPOCH], peer[w.NUM_RECEIVED] + number, payload_bytes):
                state[w.AT] = number * job[w.FRAME_STRIDE]
                _fail(state, w.NOT_DUE, i, number)
                return False
            if done + received == whole and not _is_whole(state, head, frame + HEADER_BYTES, payload_bytes):
                _fail(state, w.DAMAGED, i, number)
                return False
        elif not _goes_on(state, i):
            return False
    return True


@_jit
def _go_on(state, peers, job):  # type: ignore[no-untyped-def]
    """Sends to and receives from all peers what can be done now; how many are to be waited for."""
    whole = HEADER_BYTES + job[w.ROWS] * job[w.ROW_BYTES]
    polls = words_at(state[w.POLLS], len(peers))
    num_waiting = 0
    for i in range(len(peers)):
        is_sent = _send_more(state, peers, i, job)
        is_there = peers[i, w.RECEIVED] >= job[w.NUM_STRIPS] * whole
        if state[w.STATUS] == w.OK and not is_there:
            is_there = _receive_more(state, peers, i, job)
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
def _finish(state, peers, job):  # type: ignore[no-untyped-def]
    """Goes on until all strips have gone and come."""
    began_ms = asked_ms = _now_ms()
    while True:
        num_waiting = _go_on(state, peers, job)
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
def _sum(state, peers, job):  # type: ignore[no-untyped-def]
    """What all have sent, and what is here, in the order of ranks."""
    parts = words_at(state[w.PARTS], len(peers) + 1)
    for number in range(job[w.NUM_STRIPS]):
        for row in range(job[w.ROWS]):
            for i in range(len(peers)):
                frame = peers[i, w.FRAMES] + number * job[w.FRAME_STRIDE]
                parts[i if i < job[w.MINE] else i + 1] = frame + HEADER_BYTES + row * job[w.ROW_BYTES]
            here = job[w.X] + row * job[w.STRIDE] + number * job[w.ROW_BYTES]
            parts[job[w.MINE]] = here
            call_four(job[w.ADD], state[w.PARTS], np.int64(len(parts)), here, job[w.COUNT])


@_jit
def _work(state, peers, job):  # type: ignore[no-untyped-def]
    """Begins the sum of a strip; of the last, ends that of all."""
    _begin(state, peers, job)
    if job[w.STRIP] + 1 < job[w.NUM_STRIPS]:
        _go_on(state, peers, job)
        return
    _finish(state, peers, job)
    if state[w.STATUS] == w.OK:
        for i in range(len(peers)):
            peers[i, w.NUM_SENT] += job[w.NUM_STRIPS]
            peers[i, w.NUM_RECEIVED] += job[w.NUM_STRIPS]
        _sum(state, peers, job)


def _entry(version: int) -> Callable[[Any], None]:
    """Numba's cache knows the code by ``version`` too."""

    def exchange(at):  # type: ignore[no-untyped-def]
        if version >= 0:
            job = carray(at, w.JOB_WORDS)
            state = words_at(job[w.THE_STATE], w.STATE_WORDS)
            if take_ticket(job[w.TICKET]) == 0 and state[w.STATUS] == w.OK:
                _work(state, words_at(state[w.PEERS], (state[w.NUM_PEERS], w.PEER_WORDS)), job)

    return exchange


@cache
def compiled() -> int:
    """Address of the exchange, a C function of its job's."""
    sources = (__file__, w.__file__, frame_code.__file__, frames.__file__, checksum_ir.__file__, intrinsics.__file__)
    return c_function(types.void(types.CPointer(types.int64)), _entry, sources)
