"""Makes an attention worker of a rank: it reads no file, and has no model."""

import socket

from placement.errors import InvalidRequest, NotEnoughMemory
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.attention_worker.worker import AttentionWorker
from workers.host.device import Device

_SECRET_BYTES = 32


def open_attention_worker(load: pb.AttentionLoad, device: Device, listener: socket.socket | None) -> AttentionWorker:
    """Opens an attention worker, which serves once its thread is started.

    Raises:
        InvalidRequest: the load asks for something impossible.
        NotEnoughMemory: the device has not the memory that is to be set aside.
    """
    if listener is None:
        problem, fix = "needs a socket that model ranks connect to", "Start the worker with one."
        raise InvalidRequest(field="attention", problem=problem, fix=fix)
    if len(load.secret) != _SECRET_BYTES:
        problem = f"has {len(load.secret)} bytes"
        raise InvalidRequest(field="attention.secret", problem=problem, fix=f"Send {_SECRET_BYTES} bytes.")
    if load.kv_cache_bytes <= 0:
        problem, fix = "holds nothing", "Send a positive number."
        raise InvalidRequest(field="attention.kv_cache_bytes", value=load.kv_cache_bytes, problem=problem, fix=fix)
    available = device.available_memory_bytes
    if load.kv_cache_bytes > available:
        problem = f"needs {load.kv_cache_bytes} bytes of KV, and {device.name} has {available} left"
        fix = "Lower it, or free memory."
        raise NotEnoughMemory(field="serving.attention.kv_cache", problem=problem, fix=fix)
    return AttentionWorker(listener, secret=load.secret, kv_cache_bytes=load.kv_cache_bytes, device=device.torch_device)
