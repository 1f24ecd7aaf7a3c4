"""llama.cpp as a peer over two hosts, by RPC servers; all else as ``llamacpp_peer``.

``load`` has these settings more:

- ``endpoint``: of the server on the other host.
- ``own_endpoint``: where a server of this host shall serve; None where this process computes here.
- ``split``: ``layer`` or ``tensor``: what is divided, evenly where both hosts have a server.
- ``offloaded``: how many layers the servers have, the last ones, of which the output is one; -1 is all.
- ``is_output_remote``: whether the output really goes there, so that logits cross the link and not hidden states.
- ``micro_batch``: of the tokens that are computed at once; None is llama.cpp's own choice.
"""

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
from llamacpp_peer import Failed, measure_with
from peer_protocol import Measure, end_with_parent, serve

_LIBRARIES = Path(llama.__file__).parent / "lib"
_SERVER = Path(__file__).resolve().parent / "rpc_server.py"
_SPLITS = {"layer": llama.LLAMA_SPLIT_MODE_LAYER, "tensor": llama.LLAMA_SPLIT_MODE_TENSOR}
_LISTEN_S = 60.0
_POLL_S = 0.05


class _Override(ctypes.Structure):
    """``llama_model_tensor_buft_override``: tensors whose names match the pattern go into that type of buffer."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def load(settings: dict[str, Any]) -> tuple[Measure, dict[str, str]]:
    llama.llama_backend_init()
    params, kept = parameters(settings)
    try:
        return measure_with(params, settings)
    finally:
        kept.clear()


def parameters(settings: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Of the model, and what they point to, which has to be kept until it is loaded. Raises Failed."""
    endpoints = [settings["endpoint"]]
    if settings["own_endpoint"] is not None:
        start_server(settings["own_endpoint"], settings["threads"])
        endpoints.insert(0, settings["own_endpoint"])
    devices = (ctypes.c_void_p * (len(endpoints) + 1))(*map(device, endpoints), None)
    shares = (ctypes.c_float * llama.llama_max_devices())(*[1.0] * len(endpoints))
    overrides = (_Override * 2)((rb"^output\.weight$", local_buffer_type()), (None, None))
    params = llama.llama_model_default_params()
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
    params.split_mode = _SPLITS[settings["split"]]
    params.n_gpu_layers = settings["offloaded"]
    if not settings["is_output_remote"]:
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return params, [devices, shares, overrides]


def start_server(endpoint: str, threads: int) -> None:
    """A server that ends with this process, whose end of the pipe nobody else has. Raises Failed."""
    reader, _ = os.pipe()
    child = subprocess.Popen([sys.executable, str(_SERVER), endpoint, str(threads)], stdin=reader, stdout=2)
    os.close(reader)
    address, port = endpoint.rsplit(":", 1)
    deadline_s = time.monotonic() + _LISTEN_S
    while child.poll() is None and time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection((address, int(port)), timeout=_POLL_S):
            return
        time.sleep(_POLL_S)
    raise Failed(f"the RPC server does not serve at {endpoint}")


def device(endpoint: str) -> int:
    """The one device of a server. Raises Failed where nobody serves."""
    add_server = _function("rpc", "ggml_backend_rpc_add_server")
    add_server.argtypes = [ctypes.c_char_p]
    device_of = _function("base", "ggml_backend_reg_dev_get")
    device_of.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    registry = add_server(endpoint.encode())
    found = device_of(registry, 0) if registry else None
    if not found:
        raise Failed(f"no RPC server at {endpoint}")
    return int(found)


def local_buffer_type() -> int:
    """Of this host's memory."""
    return int(_function("base", "ggml_backend_cpu_buffer_type")())


def _function(library: str, name: str) -> Any:
    found = getattr(ctypes.CDLL(str(_LIBRARIES / f"libggml-{library}.so")), name)
    found.restype = ctypes.c_void_p
    return found


if __name__ == "__main__":
    end_with_parent()
    sys.exit(serve(load))
