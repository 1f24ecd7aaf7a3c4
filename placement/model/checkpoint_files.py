"""Owns the file names of a checkpoint, the content of its index, and how a file that cannot be used is refused.

A checkpoint is ``model.safetensors``, or several safetensors files beside an index that says which holds which tensor.
Everything here is pure: the caller reads the files.
"""

import json
from pathlib import PurePath, PurePosixPath
from typing import Any

from placement.errors import InvalidModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 1 << 26
FIX_AGAIN = "Download or export the model again."

_POINTER = b"version https://git-lfs.github.com/spec/"
_CACHED, _SNAPSHOTS, _BLOBS = "models--", "snapshots", "blobs"


def parse_object(name: str, data: bytes) -> dict[str, Any]:
    """Parses the JSON object that the file ``name`` holds.

    Raises:
        InvalidModel: the data is no JSON, or no object.
    """
    if is_lfs_pointer(data):
        raise lfs_pointer(name)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = f"is not valid JSON: {error}"
    else:
        if isinstance(values, dict):
            return values
        problem = "is not a JSON object"
    raise InvalidModel(field=name, problem=problem, fix=FIX_AGAIN)


def parse_index(data: bytes) -> dict[str, str]:
    """Returns the file name of each tensor, by tensor name, from the content of the index.

    Raises:
        InvalidModel: the index is damaged, or names anything but safetensors files right beside it.
    """
    weight_map = parse_object(INDEX_FILE, data).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        problem = "does not map tensors to files"
        raise InvalidModel(field=f"{INDEX_FILE}: weight_map", value=weight_map, problem=problem, fix=FIX_AGAIN)
    for name in dict.fromkeys(weight_map.values()):
        _check_file_name(name)
    return weight_map


def _check_file_name(name: str) -> None:
    """Raises InvalidModel unless ``name`` is that of a safetensors file right beside the index."""
    if PurePosixPath(name).name != name or "\\" in name or "\0" in name:
        problem, fix = "names a file that is not right in the model directory", FIX_AGAIN
    elif not name.endswith(".safetensors"):
        problem = "names a file of another kind"
        fix = "Only safetensors files are loaded; save the model as such."
    else:
        return
    raise InvalidModel(field=INDEX_FILE, value=name, problem=problem, fix=fix)


def is_allowed(directory: PurePath, file: PurePath) -> bool:
    """Tells whether a file may be read as one of the model directory.

    It may where it lies in the directory. In the cache of Hugging Face, where a model directory is a snapshot of a
    repository, its files are links, and what they lead to may lie in the ``blobs`` of the same repository.

    Args:
        directory: the real path of the directory, without links.
        file: the real path of the file, without links.
    """
    if file.is_relative_to(directory):
        return True
    # .../models--NAME/snapshots/REVISION, or a folder in it
    for repository in directory.parents:
        below = directory.relative_to(repository).parts
        if repository.name.startswith(_CACHED) and len(below) >= 2 and below[0] == _SNAPSHOTS:
            return file.parent == repository / _BLOBS
    return False


def is_lfs_pointer(data: bytes) -> bool:
    """Tells whether a file that begins so is a pointer of Git LFS, which stands for a file that was not downloaded."""
    return data.startswith(_POINTER)


def lfs_pointer(name: str) -> InvalidModel:
    """Makes the error for a file that is a pointer of Git LFS."""
    problem = "is a pointer of Git LFS: the file itself was not downloaded"
    fix = "Run git lfs pull in the model directory, or hf download MODEL --local-dir DIRECTORY."
    return InvalidModel(field=name, problem=problem, fix=fix)


def too_large(name: str, num_bytes: int, *, limit_bytes: int) -> InvalidModel:
    """Makes the error for a file that is larger than any sound one."""
    problem = f"has {num_bytes} bytes, which is more than the {limit_bytes} that are read"
    return InvalidModel(field=name, problem=problem, fix=FIX_AGAIN)


def leads_outside(name: str) -> InvalidModel:
    """Makes the error for a file that is a link out of the directory."""
    return InvalidModel(
        field=name,
        problem="is a link that leads out of the model directory",
        fix="Put the file itself there, as `hf download MODEL --local-dir DIRECTORY` does.",
    )
