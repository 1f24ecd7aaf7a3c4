"""The direct exchange of a tensor between ranks, and its sum, as compiled code that needs no Python.

Every rank sends all to everyone, in the frames of :mod:`workers.transport.frames`, and adds what it has when it has
everything. What is not as it should be ends the exchange, and the program that it is a work of: the state says what.

Between products whose weights fill the caches, each line of Python waits for memory: an exchange of 32 KB takes 450 us
of a core's time by Python there, and a ninth of that by this.
"""

# mypy: disallow-untyped-decorators=False, disallow-any-unimported=False

import hashlib
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from kernels.intrinsics import pointer, take_ticket
from workers.transport import frames
from workers.transport.checksum_ir import MIN_BYTES

OK, GAVE_UP, BROKEN, CLOSED, NOT_DUE, DAMAGED = range(6)
"""How an exchange ended: as it should; ``on_wait`` had it end; a connection broke, or was closed by the peer; a frame
came that was not due, or that is damaged."""

WAIT_MS = 100
"""How long it waits before it asks ``on_wait`` whether to go on."""

# Words of the state of the ranks: how the last exchange ended, which peer it waited for, by its place, and errno; the
# number of peers, and the epoch; addresses of on_wait (int32 of int64 milliseconds), of the code that folds checksums,
# and of what they are by byte; of arrays: words of each PEER, a struct pollfd for each, an address for each part in the
# order of ranks. Of a frame that is not as it should be, errno is its number in the sum, and AT where it begins.
STATUS, FAILED, ERROR, AT, NUM_PEERS, EPOCH, ON_WAIT, FOLD, TABLE, PEERS, POLLS, PARTS = range(12)
STATE_WORDS = 12
# Words of a peer: its socket; the frames sent to it and received from it before this sum; addresses of the headers that
# it is sent, a cache line each, of a struct msghdr, of that message's struct iovec, and of where its frames go, header
# and payload each; and how many bytes of all frames are done of both ways.
SOCKET, NUM_SENT, NUM_RECEIVED, HEADS, MESSAGE, PIECES, FRAMES, SENT, RECEIVED = range(9)
PEER_WORDS = 9
# Words of a job: the address of a counter that is 0 at first, since one thread does it, and of the state; where the
# tensor's first row begins, how many rows there are, and bytes from row to row; which strip of how many the job is of,
# and bytes of each in a row; the code that adds so many numbers; the rank's own place among the parts; and bytes from
# one frame that comes to the next.
TICKET, THE_STATE, X, ROWS, STRIDE, STRIP, NUM_STRIPS, ROW_BYTES, ADD, COUNT, MINE, FRAME_STRIDE = range(12)
JOB_WORDS = 12
HEAD_STRIDE = 64
_LENGTH = 3  # of a struct msghdr, in words: the number of its struct iovec

_HEADER_BYTES = frames.HEADER_BYTES
_FIELD_BYTES = frames.FIELD_BYTES
_KIND = int(frames.Kind.TENSOR)
_MAGIC = int.from_bytes(frames.MAGIC, "little")
_FLAGS = 0x4000 | 0x40  # MSG_NOSIGNAL, MSG_DONTWAIT
_AGAIN, _INTERRUPTED = 11, 4
_POLLIN, _POLLOUT = 1, 4
_MONOTONIC = 1
_ONES = 0xFFFFFFFF

_send = types.ExternalFunction("sendmsg", types.int64(types.int32, types.int64, types.int32))
_receive = types.ExternalFunction("recv", types.int64(types.int32, types.int64, types.int64, types.int32))
_poll = types.ExternalFunction("poll", types.int32(types.int64, types.uint64, types.int32))
_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_errno_at = types.ExternalFunction("__errno_location", types.int64())
_KEPT: list[Any] = []  # code lives as long as its object
_OPTIONS = {"error_model": "numpy", "nogil": True}
_jit = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_OPTIONS)


def checksum_table() -> np.ndarray[Any, np.dtype[np.int64]]:
    """What a byte makes of a checksum's register that is 0: [256]."""
    return np.array([zlib.crc32(bytes([byte]), _ONES) ^ _ONES for byte in range(256)], np.int64)


@intrinsic
def call_wait(context, function, waited_ms):  # type: ignore[no-untyped-def]
    """``int32 function(int64)``."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int32(types.int64, types.int64), generate


@intrinsic
def call_four(context, function, first, second, third, fourth):  # type: ignore[no-untyped-def]
    """``void function(int64, int64, int64, int64)``; where it takes pointers, these are as good."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@_jit
def _words(address, shape):  # type: ignore[no-untyped-def]
    return carray(pointer(address, np.int64(0)), shape)


@_jit
def _bytes(address, count):  # type: ignore[no-untyped-def]
    return carray(pointer(address, np.uint8(0)), count)


@_jit
def _load(data, at, count):  # type: ignore[no-untyped-def]
    """A little-endian number."""
    value = np.int64(0)
    for i in range(count):
        value |= np.int64(data[at + i]) << (8 * i)
    return value


@_jit
def _store(data, at, value, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        data[at + i] = np.uint8((value >> (8 * i)) & 255)


@_jit
def _checksum(data, start, stop, register, table):  # type: ignore[no-untyped-def]
    """A checksum's register, not inverted, after more bytes."""
    for i in range(start, stop):
        register = table[(register ^ data[i]) & 255] ^ (register >> 8)
    return register


@_jit
def _payload_checksum(register, start, rows, row_bytes, stride, state):  # type: ignore[no-untyped-def]
    """A checksum's register after rows at an address."""
    table = _words(state[TABLE], 256)
    folded = row_bytes - row_bytes % MIN_BYTES
    rest = np.empty(16, np.uint8)
    for row in range(rows):
        at = start + row * stride
        if folded > 0:
            call_four(state[FOLD], at, folded, register, rest.ctypes.data)
            register = _checksum(rest, 0, 16, np.int64(0), table)
        register = _checksum(_bytes(at, row_bytes), folded, row_bytes, register, table)
    return register


@_jit
def _frame_checksum(head, start, rows, row_bytes, stride, state):  # type: ignore[no-untyped-def]
    """Of a header's fields and the payload."""
    register = _checksum(head, 0, _FIELD_BYTES, np.int64(_ONES), _words(state[TABLE], 256))
    return _payload_checksum(register, start, rows, row_bytes, stride, state) ^ _ONES


@_jit
def _write_header(head, epoch, number, num_bytes):  # type: ignore[no-untyped-def]
    """All of it but the checksum, as :func:`workers.transport.frames.header` does."""
    _store(head, 0, np.int64(_MAGIC), 4)
    _store(head, 4, np.int64(_KIND), 4)
    _store(head, 8, epoch, 8)
    _store(head, 16, number, 8)
    _store(head, 24, num_bytes, 8)


@_jit
def _is_due(head, epoch, number, num_bytes):  # type: ignore[no-untyped-def]
    """Whether a header is of the frame that must come."""
    return (
        _load(head, 0, 4) == _MAGIC
        and head[4] == _KIND
        and _load(head, 8, 8) == epoch
        and _load(head, 16, 8) == number
        and _load(head, 24, 8) == num_bytes
    )


@_jit
def _fail(state, status, peer, error):  # type: ignore[no-untyped-def]
    state[STATUS], state[FAILED], state[ERROR] = status, peer, error


@_jit
def _errno():  # type: ignore[no-untyped-def]
    return np.int64(carray(pointer(_errno_at(), np.int32(0)), 1)[0])


@_jit
def _now_ms():  # type: ignore[no-untyped-def]
    time = np.empty(2, np.int64)
    _clock(np.int32(_MONOTONIC), time.ctypes.data)
    return 1000 * time[0] + time[1] // 1_000_000


@_jit
def _begin(state, peers, job):  # type: ignore[no-untyped-def]
    """The strip's frame for each peer, none of which is sent yet."""
    number = job[STRIP]
    payload_bytes = job[ROWS] * job[ROW_BYTES]
    for i in range(len(peers)):
        peer = peers[i]
        if number == 0:
            peer[SENT] = 0
            peer[RECEIVED] = 0
        head = _bytes(peer[HEADS] + number * HEAD_STRIDE, _HEADER_BYTES)
        _write_header(head, state[EPOCH], peer[NUM_SENT] + number, payload_bytes)
        start = job[X] + number * job[ROW_BYTES]
        checksum = _frame_checksum(head, start, job[ROWS], job[ROW_BYTES], job[STRIDE], state)
        _store(head, _FIELD_BYTES, checksum, 4)


@_jit
def _point(peer, job, number, offset):  # type: ignore[no-untyped-def]
    """Has the peer's message be what follows ``offset`` bytes of a frame."""
    pieces = _words(peer[PIECES], (job[ROWS] + 1, 2))
    count = 0
    if offset < _HEADER_BYTES:
        pieces[0, 0], pieces[0, 1] = peer[HEADS] + number * HEAD_STRIDE + offset, _HEADER_BYTES - offset
        count, offset = 1, _HEADER_BYTES
    row = (offset - _HEADER_BYTES) // job[ROW_BYTES]
    skip = (offset - _HEADER_BYTES) % job[ROW_BYTES]
    start = job[X] + number * job[ROW_BYTES]
    while row < job[ROWS]:
        pieces[count, 0], pieces[count, 1] = start + row * job[STRIDE] + skip, job[ROW_BYTES] - skip
        count, row, skip = count + 1, row + 1, 0
    _words(peer[MESSAGE], _LENGTH + 1)[_LENGTH] = count


@_jit
def _send_more(state, peers, i, job):  # type: ignore[no-untyped-def]
    """Sends what can be sent now of the strips so far; whether that was all."""
    peer = peers[i]
    whole = _HEADER_BYTES + job[ROWS] * job[ROW_BYTES]
    while peer[SENT] < (job[STRIP] + 1) * whole:
        _point(peer, job, peer[SENT] // whole, peer[SENT] % whole)
        sent = _send(np.int32(peer[SOCKET]), peer[MESSAGE], np.int32(_FLAGS))
        if sent >= 0:
            peer[SENT] += sent
        else:
            error = _errno()
            if error == _AGAIN:
                return False
            if error != _INTERRUPTED:
                _fail(state, BROKEN, i, error)
                return False
    return True


@_jit
def _receive_more(state, peers, i, job):  # type: ignore[no-untyped-def]
    """Receives what has come; whether that was all strips, and as they should be."""
    peer = peers[i]
    payload_bytes = job[ROWS] * job[ROW_BYTES]
    whole = _HEADER_BYTES + payload_bytes
    while peer[RECEIVED] < job[NUM_STRIPS] * whole:
        number, done = peer[RECEIVED] // whole, peer[RECEIVED] % whole
        frame = peer[FRAMES] + number * job[FRAME_STRIDE]
        received = _receive(np.int32(peer[SOCKET]), frame + done, whole - done, np.int32(_FLAGS))
        if received == 0:
            _fail(state, CLOSED, i, np.int64(0))
            return False
        if received > 0:
            peer[RECEIVED] += received
            has_head = done < _HEADER_BYTES and done + received >= _HEADER_BYTES
            head = _bytes(frame, _HEADER_BYTES)
            if has_head and not _is_due(head, state[EPOCH], peer[NUM_RECEIVED] + number, payload_bytes):
                state[AT] = number * job[FRAME_STRIDE]
                _fail(state, NOT_DUE, i, number)
                return False
        else:
            error = _errno()
            if error == _AGAIN:
                return False
            if error != _INTERRUPTED:
                _fail(state, BROKEN, i, error)
                return False
    return True


@_jit
def _check(state, peers, i, job):  # type: ignore[no-untyped-def]
    """The checksums of frames that have come."""
    for number in range(job[NUM_STRIPS]):
        frame = peers[i, FRAMES] + number * job[FRAME_STRIDE]
        head, payload = _bytes(frame, _HEADER_BYTES), frame + _HEADER_BYTES
        checksum = _frame_checksum(head, payload, np.int64(1), job[ROWS] * job[ROW_BYTES], np.int64(0), state)
        if checksum != _load(head, _FIELD_BYTES, 4):
            _fail(state, DAMAGED, i, number)
            return


@_jit
def _go_on(state, peers, job):  # type: ignore[no-untyped-def]
    """Sends to and receives from all peers what can be done now; how many are to be waited for."""
    whole = _HEADER_BYTES + job[ROWS] * job[ROW_BYTES]
    polls = _words(state[POLLS], len(peers))
    num_waiting = 0
    for i in range(len(peers)):
        is_sent = _send_more(state, peers, i, job)
        is_there = peers[i, RECEIVED] >= job[NUM_STRIPS] * whole
        if state[STATUS] == OK and not is_there:
            is_there = _receive_more(state, peers, i, job)
            if is_there:
                _check(state, peers, i, job)
        if state[STATUS] != OK:
            return 0
        if not (is_sent and is_there):
            if num_waiting == 0:
                state[FAILED] = i
            events = (0 if is_sent else _POLLOUT) | (0 if is_there else _POLLIN)
            polls[num_waiting] = peers[i, SOCKET] | (np.int64(events) << 32)
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
        _poll(state[POLLS], np.uint64(num_waiting), np.int32(WAIT_MS))
        now_ms = _now_ms()
        if now_ms - asked_ms >= WAIT_MS:
            asked_ms = now_ms
            if call_wait(state[ON_WAIT], now_ms - began_ms) != 0:
                state[STATUS] = GAVE_UP
                return


@_jit
def _sum(state, peers, job):  # type: ignore[no-untyped-def]
    """What all have sent, and what is here, in the order of ranks."""
    parts = _words(state[PARTS], len(peers) + 1)
    for number in range(job[NUM_STRIPS]):
        for row in range(job[ROWS]):
            for i in range(len(peers)):
                frame = peers[i, FRAMES] + number * job[FRAME_STRIDE]
                parts[i if i < job[MINE] else i + 1] = frame + _HEADER_BYTES + row * job[ROW_BYTES]
            here = job[X] + row * job[STRIDE] + number * job[ROW_BYTES]
            parts[job[MINE]] = here
            call_four(job[ADD], state[PARTS], np.int64(len(parts)), here, job[COUNT])


@_jit
def _work(state, peers, job):  # type: ignore[no-untyped-def]
    """Begins the sum of a strip; of the last, ends that of all."""
    _begin(state, peers, job)
    if job[STRIP] + 1 < job[NUM_STRIPS]:
        _go_on(state, peers, job)
        return
    _finish(state, peers, job)
    if state[STATUS] == OK:
        for i in range(len(peers)):
            peers[i, NUM_SENT] += job[NUM_STRIPS]
            peers[i, NUM_RECEIVED] += job[NUM_STRIPS]
        _sum(state, peers, job)


def _entry(version: int) -> Callable[[Any], None]:
    """Numba's cache knows the code by ``version`` too."""

    def exchange(at):  # type: ignore[no-untyped-def]
        if version >= 0:
            job = carray(at, JOB_WORDS)
            state = _words(job[THE_STATE], STATE_WORDS)
            if take_ticket(job[TICKET]) == 0 and state[STATUS] == OK:
                _work(state, _words(state[PEERS], (state[NUM_PEERS], PEER_WORDS)), job)

    return exchange


@cache
def compiled() -> int:
    """Address of the exchange, a C function of its job's; from Numba's cache on disk where it can be written."""
    version = int.from_bytes(hashlib.sha256(Path(__file__).read_bytes()).digest()[:4])
    signature = types.void(types.CPointer(types.int64))
    try:
        callback = cfunc(signature, cache=True)(_entry(version))
    except RuntimeError:  # neither beside the source nor in the user's own cache directory
        callback = cfunc(signature)(_entry(version))
    _KEPT.append(callback)
    return int(callback.address)
