"""Reads a rank's slices of a checkpoint. Owns the trust in its files: safetensors only, never a pickle.

A checkpoint is ``model.safetensors``, or shards named by ``model.safetensors.index.json``.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels import gptq
from kernels.rounded import RoundedWeight, round_weight
from placement.errors import InvalidModel
from placement.model.quantization import (
    LinearFormat,
    checkpoint_tensors,
    gptq_tensors,
    head_weight,
    is_layer_weight,
    loaded_bytes,
)
from placement.model.weights import HEAD, TensorSlice
from workers.host.device import TORCH_DTYPES
from workers.model.rounded import FIX_GPTQ, rounded_parts

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_INDEX_BYTES = 64 << 20
_MOST_MAPPED = 16 << 20  # numbers of a checkpoint
_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}
_FIX_COPY = "Copy the model's files again."


def load_weights(
    path: Path,
    slices: Sequence[TensorSlice],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None],
    linear: LinearFormat | None = None,
) -> dict[str, Tensor]:
    """The slices, by tensor name, converted to ``dtype`` on ``device``; no other bytes are read.

    In place of ``NAME.weight``, a linear layer that ``linear`` holds in fewer bits has what :func:`take_rounded` takes
    for NAME; a tied head that it rounds is there beside the embedding. Tensors are rounded one by one, so that no
    more than one of them is there in full.

    Args:
        path: the model's directory.
        slices: what to read.
        dtype: number type of the result; float32, bfloat16 and float16 files are converted.
        device: where the result goes.
        progress: called after every tensor with the bytes loaded so far and in all, counted as they are held.
        linear: how the weights of linear layers are held; None: in ``dtype``.

    Raises:
        InvalidModel: a file or tensor is missing, damaged, not safetensors, or of the wrong shape or type.
    """
    sources = {slice_: dict(checkpoint_tensors([slice_], linear)) for slice_ in slices}
    total_bytes, done_bytes = loaded_bytes(slices, _DTYPES[dtype], linear), 0
    weights: dict[str, Tensor] = {}
    for slice_, read in _read_all(path, sources, device):
        held = _held(slice_, read, dtype, linear, head=head_weight(slices))
        weights.update(held)
        done_bytes += sum(tensor.nbytes for tensor in held.values())
        progress(done_bytes, total_bytes)
    return weights


def _read_all(
    path: Path, sources: Mapping[TensorSlice, Mapping[TensorSlice, Sequence[str]]], device: torch.device
) -> Iterator[tuple[TensorSlice, dict[str, Tensor]]]:
    """Every slice with the checkpoint's tensors for it, as they are stored, once all of them are read.

    Args:
        sources: the tensors of each slice, each with the number types that it may have.
    """
    wholes = {part.name: slice_ for slice_, parts in sources.items() for part in parts}
    read: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    located = _locate(path, [part for parts in sources.values() for part in parts])
    for file, wanted in ((file, some) for file, parts in located.items() for some in _few(parts)):
        try:
            # Context left soon: what was read of a file stays mapped, and counts as this process's memory, until then.
            with safe_open(file, framework="pt") as reader:
                names = frozenset(reader.keys())
                for part in wanted:
                    slice_ = wholes[part.name]
                    accepted = sources[slice_]
                    read[slice_.name][part.name] = _read(reader, names, file, part, accepted[part]).to(device)
                    if len(read[slice_.name]) == len(accepted):
                        yield slice_, read.pop(slice_.name)
        except (SafetensorError, OSError) as error:
            problem = f"cannot be read as safetensors ({error})"
            raise _refusal(file.name, str(file), problem, _FIX_COPY) from error


def _few(parts: Sequence[TensorSlice]) -> Iterator[Sequence[TensorSlice]]:
    """Neighbours among the parts of a file, of not too many numbers together."""
    some: list[TensorSlice] = []
    for part in parts:
        if some and sum(one.num_elements for one in some) + part.num_elements > _MOST_MAPPED:
            yield some
            some = []
        some.append(part)
    if some:
        yield some


def _held(
    slice_: TensorSlice,
    read: Mapping[str, Tensor],
    dtype: torch.dtype,
    linear: LinearFormat | None,
    *,
    head: TensorSlice | None,
) -> dict[str, Tensor]:
    """What is kept of a slice, given the checkpoint's tensors for it."""
    if linear is not None and is_layer_weight(slice_):
        unpack = _round if linear.gptq is None else _unpack
        return rounded_parts(slice_.name, unpack(slice_, read, linear))
    held: dict[str, Tensor] = {}
    if linear is not None and linear.head_bits is not None and slice_ == head:
        held = rounded_parts(HEAD, _round(slice_, read, replace(linear, bits=linear.head_bits)))
    if slice_.name != HEAD or not held:
        # A copy even where nothing changes: the file's mapping must not outlive this call.
        held[slice_.name] = read[slice_.name].to(dtype, copy=True, memory_format=torch.contiguous_format)
    return held


def _round(slice_: TensorSlice, read: Mapping[str, Tensor], linear: LinearFormat) -> RoundedWeight:
    weight = read[slice_.name]
    group_size = linear.group_size(slice_.shape[1])  # of the whole layer, however it is cut
    assert group_size is not None, slice_  # placement.model.quantization.check_linear_format refuses it
    return round_weight(weight, bits=linear.bits, group_size=group_size)


def _unpack(slice_: TensorSlice, read: Mapping[str, Tensor], linear: LinearFormat) -> RoundedWeight:
    assert linear.gptq is not None, linear
    tensors = gptq_tensors(slice_, linear)
    codes, zeros, scales, groups = (read[part.name] for part in tensors.all)
    try:
        return gptq.unpack(
            codes,
            zeros,
            scales,
            groups - slice_.spans[1].start // (linear.group_size(slice_.shape[1]) or slice_.shape[1]),
            bits=linear.bits,
            zero_shift=linear.gptq.zero_shift,
            offsets=linear.offsets,
        )
    except ValueError as error:
        raise _refusal(slice_.name, None, f"is no such GPTQ weight: {error}", FIX_GPTQ) from error


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
    accepted: Sequence[str],
) -> Tensor:
    """One slice out of an open file, as it is stored, checked against the shape that config.json promises."""
    field = f"{file.name}: {slice_.name}"
    if slice_.name not in names:
        raise _refusal(field, slice_.name, "is missing from the file", "Use the config.json of this checkpoint.")
    stored = reader.get_slice(slice_.name)
    shape = tuple(stored.get_shape())
    if shape != slice_.shape:
        problem = f"does not have the shape {slice_.shape} that config.json promises"
        raise _refusal(field, shape, problem, "Use the config.json that was saved with these weights.")
    if stored.get_dtype() not in accepted:
        fix = f"Use a checkpoint that has it as one of {', '.join(accepted)}."
        raise _refusal(field, stored.get_dtype(), "is not a number type that is served", fix)
    tensor: Tensor = stored[tuple(slice(span.start, span.stop) for span in slice_.spans)]
    return tensor


def _refusal(field: str, value: object, problem: str, fix: str) -> InvalidModel:
    return InvalidModel(field=field, value=value, problem=problem, fix=fix)
