"""llama.cpp's RPC server with this host's CPU as its one device: ``rpc_server.py ADDRESS:PORT THREADS``.

Runs in llama.cpp's own virtual environment. Ends when its standard input does, so that it never outlives its driver.
"""

import ctypes
import os
import sys
import threading
from pathlib import Path

import llama_cpp
from peer_protocol import end_with_parent

_LIBRARIES = Path(llama_cpp.__file__).parent / "lib"


def end_with_input() -> None:
    """The server itself never returns, and its own process is all that it has."""
    while sys.stdin.buffer.read1():
        pass
    os._exit(0)


def main(endpoint: str, threads: str) -> None:
    end_with_parent()
    threading.Thread(target=end_with_input, daemon=True).start()
    cpu, base, rpc = (ctypes.CDLL(str(_LIBRARIES / f"libggml-{name}.so")) for name in ("cpu", "base", "rpc"))
    cpu.ggml_backend_cpu_reg.restype = ctypes.c_void_p
    device_of = base.ggml_backend_reg_dev_get
    device_of.argtypes, device_of.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p
    devices = (ctypes.c_void_p * 1)(device_of(cpu.ggml_backend_cpu_reg(), 0))
    start = rpc.ggml_backend_rpc_start_server
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    start.restype = None
    start(endpoint.encode(), None, int(threads), 1, devices)
    sys.exit(f"llama.cpp's RPC server cannot serve at {endpoint}")


if __name__ == "__main__":
    main(*sys.argv[1:])
