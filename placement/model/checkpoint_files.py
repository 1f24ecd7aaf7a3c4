"""Owns the file names of a checkpoint, the content of its index, and how a file that cannot be used is refused.

A checkpoint is ``model.safetensors``, or several safetensors files beside an index that says which holds which tensor.
Everything here is pure: the caller reads the files.
"""

import json
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from placement.errors import InvalidModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 1 << 26
FIX_AGAIN = "Download or export the model again."

_PICKLED = (".bin", ".pt", ".pth")


def parse_object(name: str, data: bytes) -> dict[str, Any]:
    """Parses the JSON object that the file ``name`` holds.

    Raises:
        InvalidModel: the data is no JSON, or no object.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = f"is not valid JSON: {error}"
    else:
        if isinstance(values, dict):
            return values
        problem = "is not a JSON object"
    raise InvalidModel(field=name, value=len(data), problem=problem, fix=FIX_AGAIN)


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


def no_weights(file_names: Iterable[str]) -> InvalidModel:
    """Makes the error for a directory with these files, which holds neither a single file nor an index."""
    pickled = sorted(name for name in file_names if name.endswith(_PICKLED))
    if not pickled:
        return missing_file(SINGLE_FILE)
    problem = "holds weights as pickles only, which can run code and are never loaded"
    fix = "Save the model as safetensors: model.save_pretrained(path, safe_serialization=True)."
    return InvalidModel(field="model.path", value=pickled[0], problem=problem, fix=fix)


def missing_file(name: str) -> InvalidModel:
    """Makes the error for a file that the directory must have and has not."""
    return InvalidModel(field="model.path", value=name, problem="lacks a file", fix=FIX_AGAIN)


def too_large(name: str, num_bytes: int, *, limit_bytes: int) -> InvalidModel:
    """Makes the error for a file that is larger than any sound one."""
    return InvalidModel(field=name, value=num_bytes, problem=f"is larger than {limit_bytes} bytes", fix=FIX_AGAIN)


def leads_outside(name: str) -> InvalidModel:
    """Makes the error for a file that is a link out of the directory."""
    return InvalidModel(
        field=name,
        value=name,
        problem="leads out of the model directory",
        fix="Put the file itself there, as `hf download MODEL --local-dir DIRECTORY` does.",
    )
