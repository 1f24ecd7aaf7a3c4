"""Reads a rank's slices of a checkpoint. Owns the trust in its files: safetensors only, never a pickle.

A checkpoint is ``model.safetensors``, or shards named by ``model.safetensors.index.json``.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from placement.errors import InvalidModel
from placement.weights import TensorSlice

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_INDEX_BYTES = 64 << 20
_ACCEPTED_DTYPES = ("F32", "BF16", "F16")
_FIX_COPY = "Copy the model's files again."


def load_weights(
    path: Path,
    slices: Sequence[TensorSlice],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """The slices, by tensor name, converted to ``dtype`` on ``device``; no other bytes are read.

    Args:
        path: the model's directory.
        slices: what to read.
        dtype: number type of the result; float32, bfloat16 and float16 files are converted.
        device: where the result goes.
        progress: called after every tensor with the bytes loaded so far and in all, counted in ``dtype``.

    Raises:
        InvalidModel: a file or tensor is missing, damaged, not safetensors, or of the wrong shape or type.
    """
    total_bytes = sum(slice_.num_elements for slice_ in slices) * dtype.itemsize
    loaded_bytes = 0
    weights: dict[str, Tensor] = {}
    for file, wanted in _locate(path, slices).items():
        try:
            # Context left before the next shard opens: one file is mapped at a time.
            with safe_open(file, framework="pt") as reader:
                names = frozenset(reader.keys())
                for slice_ in wanted:
                    weights[slice_.name] = _read(reader, names, file, slice_, dtype, device)
                    loaded_bytes += weights[slice_.name].nbytes
                    progress(loaded_bytes, total_bytes)
        except (SafetensorError, OSError) as error:
            problem = f"cannot be read as safetensors ({error})"
            raise _refusal(file.name, str(file), problem, _FIX_COPY) from error
    return weights


def _locate(path: Path, slices: Sequence[TensorSlice]) -> Mapping[Path, Sequence[TensorSlice]]:
    """Which file holds which slice."""
    if (path / SINGLE_FILE).is_file():
        _check_inside(path / SINGLE_FILE)
        return {path / SINGLE_FILE: slices}
    if not (path / INDEX_FILE).is_file():
        raise _nothing_to_load(path)
    weight_map = _read_weight_map(path / INDEX_FILE)
    located: defaultdict[Path, list[TensorSlice]] = defaultdict(list)
    for slice_ in slices:
        if slice_.name not in weight_map:
            raise _refusal(INDEX_FILE, slice_.name, "does not list a tensor of the model", _FIX_COPY)
        located[path / _plain_name(weight_map[slice_.name])].append(slice_)
    for file in located:
        if not file.is_file():
            raise _refusal(INDEX_FILE, file.name, "names a file that is missing", _FIX_COPY)
        _check_inside(file)
    return located


def _check_inside(file: Path) -> None:
    """A link may not lead out of the model's directory."""
    if not file.resolve().is_relative_to(file.parent.resolve()):
        raise _refusal(file.name, str(file), "is a link out of the model's directory", _FIX_COPY)


def _read_weight_map(index: Path) -> Mapping[str, object]:
    """The ``weight_map`` of the index: file name by tensor name, unchecked."""
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise _refusal(index.name, index.stat().st_size, f"is over {_MAX_INDEX_BYTES} bytes", _FIX_COPY)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _refusal(index.name, str(index), "is not JSON", _FIX_COPY) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise _refusal(index.name, weight_map, "has no object weight_map", _FIX_COPY)
    return weight_map


def _plain_name(name: object) -> str:
    """``name`` if it is that of a safetensors file beside the index, and leads nowhere else."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
        raise _refusal(INDEX_FILE, name, "names a file outside the model's directory", _FIX_COPY)
    if not name.endswith(".safetensors"):
        fix = "Only safetensors files are read: save the model with safe_serialization=True."
        raise _refusal(INDEX_FILE, name, "names a file that is not safetensors", fix)
    return name


def _nothing_to_load(path: Path) -> InvalidModel:
    if any(path.glob("*.bin")) or any(path.glob("*.pth")) or any(path.glob("*.pt")):
        problem = "holds pickled weights only, which could run code and are never read"
        fix = f"Convert them to {SINGLE_FILE} with transformers: save_pretrained(safe_serialization=True)."
        return _refusal(SINGLE_FILE, str(path), problem, fix)
    fix = f"Give a directory with {SINGLE_FILE}, or {INDEX_FILE} and its files."
    return _refusal(SINGLE_FILE, str(path), "is missing from the directory", fix)


def _read(
    reader: Any,  # safe_open is untyped
    names: frozenset[str],
    file: Path,
    slice_: TensorSlice,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """One slice out of an open file, checked against the shape that config.json promises."""
    field = f"{file.name}: {slice_.name}"
    if slice_.name not in names:
        raise _refusal(field, slice_.name, "is missing from the file", "Use the config.json of this checkpoint.")
    stored = reader.get_slice(slice_.name)
    shape = tuple(stored.get_shape())
    if shape != slice_.shape:
        problem = f"does not have the shape {slice_.shape} that config.json promises"
        raise _refusal(field, shape, problem, "Use the config.json that was saved with these weights.")
    if stored.get_dtype() not in _ACCEPTED_DTYPES:
        fix = "Use the model's float32, bfloat16 or float16 weights."
        raise _refusal(field, stored.get_dtype(), "is not a number type that is served", fix)
    tensor: Tensor = stored[tuple(slice(span.start, span.stop) for span in slice_.spans)]
    # A copy even where nothing changes: the file's mapping must not outlive this call.
    return tensor.to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def _refusal(field: str, value: object, problem: str, fix: str) -> InvalidModel:
    return InvalidModel(field=field, value=value, problem=problem, fix=fix)
