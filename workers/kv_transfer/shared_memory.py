"""Memory that a source rank and a target rank on one machine share, for the bodies of pieces.

The target rank makes it without a name, so that nothing is left behind when either process is killed. The source rank
opens it by the target's process and descriptor, where the system lets it, and otherwise sends bodies over TCP. It only
writes and the target only reads. The size is sealed, so that neither end can take it away from the other.
"""

import contextlib
import fcntl
import functools
import hashlib
import mmap
import os
import secrets
import socket
import stat
from pathlib import Path

from workers.kv_transfer.wire import HOST_BYTES, NONCE_BYTES, WindowName
from workers.transport.errors import BadFrame

SLOT_BYTES = 2 << 20
NUM_SLOTS = 4
_FIRST_BYTE = mmap.PAGESIZE  # of the first slot; the nonce lies before it
_NAME = "heterodyne-kv"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def host_digest() -> bytes:
    """Returns a digest of this machine's boot and host name; zeros where the system does not tell of its boot."""
    try:
        boot = _BOOT_ID.read_bytes()
    except OSError:
        return bytes(HOST_BYTES)
    return hashlib.blake2b(boot + socket.gethostname().encode(), digest_size=HOST_BYTES).digest()


def is_same_host(host: bytes) -> bool:
    """Tells whether a digest of another process is this machine's."""
    return any(host) and host == host_digest()


class Window:
    """The target rank's end: it owns the memory.

    Attributes:
        name: what the source rank must know to open it.
    """

    def __init__(self) -> None:
        """Makes the memory. Raises OSError where the system has none of that kind."""
        self._fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, _FIRST_BYTE + NUM_SLOTS * SLOT_BYTES)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            nonce = secrets.token_bytes(NONCE_BYTES)
            os.pwrite(self._fd, nonce, 0)
            self._memory = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
        except OSError:
            os.close(self._fd)
            raise
        self.name = WindowName(os.getpid(), self._fd, nonce, SLOT_BYTES, NUM_SLOTS)

    def has(self, slot: int, num_bytes: int) -> bool:
        """Tells whether there is such a slot, and that many bytes in it."""
        return 0 <= slot < NUM_SLOTS and num_bytes <= SLOT_BYTES

    def read(self, slot: int, memory: memoryview) -> None:
        """Copies the first bytes of a slot to ``memory``."""
        start = _FIRST_BYTE + slot * SLOT_BYTES
        with memoryview(self._memory) as whole:
            memory[:] = whole[start : start + memory.nbytes]

    def close(self) -> None:
        """Gives the memory back."""
        self._memory.close()
        os.close(self._fd)


def open_window() -> Window | None:
    """Makes shared memory, or returns None where the system has none."""
    try:
        return Window()
    except (OSError, AttributeError):  # not Linux, or no memory or descriptors left
        return None


class RemoteWindow:
    """The source rank's end.

    Attributes:
        free: the slots that may be written.
    """

    def __init__(self, name: WindowName) -> None:
        """Opens the memory. Raises OSError where it cannot be opened or is not the one that was named."""
        path = f"/proc/{name.pid}/fd/{name.fd}"
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise OSError(f"{path} is something else")
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            state = os.fstat(self._fd)
            is_whole = state.st_size == _FIRST_BYTE + name.num_slots * name.slot_bytes
            if not stat.S_ISREG(state.st_mode) or not is_whole or os.pread(self._fd, NONCE_BYTES, 0) != name.nonce:
                raise OSError(f"{path} is the memory of another process")
        except OSError:
            os.close(self._fd)
            raise
        self.slot_bytes = name.slot_bytes
        self._num_slots = name.num_slots
        self.free = list(range(name.num_slots))

    def release(self, slot: int) -> None:
        """Notes that a slot may be written again. Raises BadFrame where it was free, or there is none such."""
        if slot in self.free or slot >= self._num_slots:
            raise BadFrame(f"a KV_ACK names slot {slot}, which was not in use")
        self.free.append(slot)

    def write(self, slot: int, body: memoryview) -> None:
        """Copies ``body`` to the first bytes of a slot. Raises OSError."""
        start, num_written = _FIRST_BYTE + slot * self.slot_bytes, 0
        while num_written < body.nbytes:
            num_written += os.pwrite(self._fd, body[num_written:], start + num_written)

    def close(self) -> None:
        """Lets go of the memory."""
        os.close(self._fd)


def open_remote(name: WindowName | None) -> RemoteWindow | None:
    """Opens the memory that a target rank offers, or returns None where that cannot be done."""
    if name is None or name.slot_bytes <= 0:
        return None
    with contextlib.suppress(OSError):  # another container or user: bodies go over TCP
        return RemoteWindow(name)
    return None
