"""Reads a rank's slices of a checkpoint, from safetensors files only and never from a pickle.

:mod:`placement.model.checkpoint_files` says which files a checkpoint consists of.
"""

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
from placement.model.checkpoint_files import (
    FIX_AGAIN,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    SINGLE_FILE,
    is_lfs_pointer,
    lfs_pointer,
    parse_index,
)
from placement.model.missing_files import no_weights
from placement.model.quantization import (
    LinearFormat,
    checkpoint_tensors,
    gptq_tensors,
    head_weight,
    is_layer_weight,
    loaded_bytes,
)
from placement.model.weights import HEAD, TensorSlice, stored_name
from workers.host.device import TORCH_DTYPES
from workers.host.model_files import exists, inside, list_directory, read_bytes, readable
from workers.model.rounded import FIX_GPTQ, rounded_parts

_MOST_MAPPED = 16 << 20  # elements that are read of a file before its mapping is given back
_POINTER_BYTES = 256
_DTYPES = {torch_dtype: dtype for dtype, torch_dtype in TORCH_DTYPES.items()}


def load_weights(
    path: Path,
    slices: Sequence[TensorSlice],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None],
    linear: LinearFormat | None = None,
) -> dict[str, Tensor]:
    """Loads the slices, converts them to ``dtype`` on ``device``, and reads no other bytes.

    Tensors are rounded one by one, so that at most one of them exists in full.

    Args:
        path: the model's directory.
        slices: the parts of tensors to read.
        dtype: the number type of the result; float32, bfloat16 and float16 files are converted.
        device: the device that the result goes to.
        progress: a function that is called at first and after every tensor with the bytes loaded so far and in all,
            counted as they are held.
        linear: the format of linear layers; None: they are held in ``dtype``.

    Returns:
        The tensors by name. A linear layer that ``linear`` holds in fewer bits has, in place of ``NAME.weight``, the
        tensors that :func:`take_rounded` takes for NAME; a tied head that it rounds is there beside the embedding.

    Raises:
        InvalidModel: a file or tensor is missing, damaged, not safetensors, or of the wrong shape or type.
    """
    sources = {slice_: dict(checkpoint_tensors([slice_], linear)) for slice_ in slices}
    total_bytes, done_bytes = loaded_bytes(slices, _DTYPES[dtype], linear), 0
    weights: dict[str, Tensor] = {}
    progress(0, total_bytes)
    for slice_, read in _read_all(path, sources, device):
        held = _held(slice_, read, dtype, linear, head=head_weight(slices))
        weights.update(held)
        done_bytes += sum(tensor.nbytes for tensor in held.values())
        progress(done_bytes, total_bytes)
    return weights


def _read_all(
    path: Path, sources: Mapping[TensorSlice, Mapping[TensorSlice, Sequence[str]]], device: torch.device
) -> Iterator[tuple[TensorSlice, dict[str, Tensor]]]:
    """Yields every slice with the checkpoint's tensors for it, as they are stored, once all of them are read.

    Args:
        sources: the checkpoint's tensors for each slice, each with the number types that it may have.
    """
    wholes = {part.name: slice_ for slice_, parts in sources.items() for part in parts}
    read: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    located = _locate(path, [part for parts in sources.values() for part in parts])
    for file, wanted in ((file, group) for file, parts in located.items() for group in _groups(parts)):
        try:
            # The pages that were read stay mapped, and count as this process's memory, until the context is left.
            with safe_open(file, framework="pt") as reader:
                names = frozenset(reader.keys())
                for part in wanted:
                    slice_ = wholes[part.name]
                    accepted = sources[slice_]
                    read[slice_.name][part.name] = _read(reader, names, file, part, accepted[part]).to(device)
                    if len(read[slice_.name]) == len(accepted):
                        yield slice_, read.pop(slice_.name)
        except (SafetensorError, OSError) as error:
            if is_lfs_pointer(_begin(file)):
                raise lfs_pointer(file.name) from error
            problem = f"cannot be read as safetensors ({error})"
            raise _refusal(file.name, str(file), problem, FIX_AGAIN) from error


def _begin(file: Path) -> bytes:
    with readable(file), file.open("rb") as opened:
        return opened.read(_POINTER_BYTES)


def _groups(parts: Sequence[TensorSlice]) -> Iterator[Sequence[TensorSlice]]:
    """Groups neighbours among the parts of a file, so that a group has not too many elements."""
    group: list[TensorSlice] = []
    for part in parts:
        if group and sum(member.num_elements for member in group) + part.num_elements > _MOST_MAPPED:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _held(
    slice_: TensorSlice,
    read: Mapping[str, Tensor],
    dtype: torch.dtype,
    linear: LinearFormat | None,
    *,
    head: TensorSlice | None,
) -> dict[str, Tensor]:
    """Makes the tensors that are kept of a slice, given the checkpoint's tensors for it."""
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


def weight_files(path: Path, slices: Sequence[TensorSlice], linear: LinearFormat | None) -> tuple[str, ...]:
    """Names the files that hold the slices. Raises InvalidModel where one is missing."""
    return tuple(file.name for file in _locate(path, [part for part, _ in checkpoint_tensors(slices, linear)]))


def _locate(path: Path, slices: Sequence[TensorSlice]) -> Mapping[Path, Sequence[TensorSlice]]:
    """Finds the file that holds each slice."""
    if exists(path, SINGLE_FILE):
        return {inside(path, SINGLE_FILE): slices}
    if not exists(path, INDEX_FILE):
        raise no_weights(list_directory(path))
    names = parse_index(read_bytes(path, INDEX_FILE, MAX_INDEX_BYTES))
    located: defaultdict[Path, list[TensorSlice]] = defaultdict(list)
    for slice_ in slices:
        name = stored_name(slice_.name, names)
        if name not in names:
            raise _refusal(INDEX_FILE, None, f"lacks the tensor {name}", FIX_AGAIN)
        located[inside(path, names[name])].append(slice_)
    return located


def _read(
    reader: Any,  # safe_open is untyped
    names: frozenset[str],
    file: Path,
    slice_: TensorSlice,
    accepted: Sequence[str],
) -> Tensor:
    """Reads one slice of an open file as it is stored, and checks it against the shape that config.json promises."""
    name = stored_name(slice_.name, names)
    field = f"{file.name}: {name}"
    if name not in names:
        raise _refusal(field, None, "is missing from the file", "Use the config.json of this checkpoint.")
    stored = reader.get_slice(name)
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
