"""Makes an attention worker of a rank: it reads no file, and has no model."""

import socket
from collections.abc import Iterable

import numpy as np
import torch

from kernels.attention import LayerCache, PartSpan
from kernels.select import kernels_for
from placement.errors import InvalidRequest, NotEnoughMemory
from protos.codec.formats import read_dtype
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.attention_worker.worker import AttentionWorker
from workers.host.device import TORCH_DTYPES, Device

_SECRET_BYTES = 32
_MOST_HEAD_DIM = 1024


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
    if not 0 <= load.head_dim <= _MOST_HEAD_DIM:
        problem, fix = f"is not within 0 and {_MOST_HEAD_DIM}", "Send the model's."
        raise InvalidRequest(field="attention.head_dim", value=load.head_dim, problem=problem, fix=fix)
    available = device.available_memory_bytes
    if load.kv_cache_bytes > available:
        problem = f"needs {load.kv_cache_bytes} bytes of KV, and {device.name} has {available} left"
        fix = "Lower it, or free memory."
        raise NotEnoughMemory(field="serving.attention.kv_cache", problem=problem, fix=fix)
    if load.head_dim:
        _compile([TORCH_DTYPES[read_dtype(dtype)] for dtype in load.dtypes], load.head_dim, device.torch_device)
    return AttentionWorker(listener, secret=load.secret, kv_cache_bytes=load.kv_cache_bytes, device=device.torch_device)


def _compile(dtypes: Iterable[torch.dtype], head_dim: int, device: torch.device) -> None:
    """Attends once to a token of each number type, so that no session waits until the code for it is compiled."""
    kernels = kernels_for(device)
    span = PartSpan(query_start=0, runs=np.array([[0, 1]]), seen=np.array([[0, 1]]))
    for dtype in dtypes:
        rows = torch.zeros(1, 1, head_dim, dtype=dtype, device=device)
        cache = LayerCache(keys=torch.zeros_like(rows), values=torch.zeros_like(rows))
        kernels.write_kv(cache, torch.zeros(1, dtype=torch.int64, device=device), rows, rows)
        kernels.attend_parts(rows, cache, kernels.plan_parts([span]), head_dim**-0.5)
