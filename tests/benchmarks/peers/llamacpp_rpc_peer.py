"""llama.cpp as a peer whose last layers are on another host, behind its RPC server; all else as ``llamacpp_peer``.

``load`` has three settings more: ``endpoint`` of the server, ``remote_layers``, and ``is_output_remote``: whether the
last linear layer is there as well, so that logits cross the link, and not the hidden states they are made of.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
from llamacpp_peer import Failed, measure_with
from peer_protocol import Measure, serve

_LIBRARIES = Path(llama.__file__).parent / "lib"


class _Override(ctypes.Structure):
    """``llama_model_tensor_buft_override``: tensors whose names match the pattern go into that type of buffer."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def load(settings: dict[str, Any]) -> tuple[Measure, dict[str, str]]:
    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    devices = (ctypes.c_void_p * 2)(device(settings["endpoint"]), None)
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.n_gpu_layers = settings["remote_layers"] + 1  # llama.cpp counts the last linear layer, and starts with it
    overrides = (_Override * 2)((rb"^output\.weight$", local_buffer_type()), (None, None))
    if not settings["is_output_remote"]:
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return measure_with(params, settings)


def device(endpoint: str) -> int:
    """The one device of a server. Raises Failed where nobody serves."""
    add_server, device_of = (
        _function("rpc", "ggml_backend_rpc_add_server"),
        _function("base", "ggml_backend_reg_dev_get"),
    )
    add_server.argtypes = [ctypes.c_char_p]
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
    sys.exit(serve(load))
