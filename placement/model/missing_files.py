"""Says what a directory lacks to be a model's, or why it cannot be read, and what to give or do. Pure."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from placement.errors import InvalidConfig, InvalidModel
from placement.model.checkpoint_files import FIX_AGAIN, SINGLE_FILE, is_allowed, leads_outside

FIX_PICKLES = "Save the model as safetensors: model.save_pretrained(path, safe_serialization=True)."

_MOST_NAMED = 3
_PICKLED = (".bin", ".pt", ".pth")
_CACHED = "models--"
# What a directory may hold in place of a model in the Hugging Face layout: how its files end, what they are, the fix.
_KINDS = (
    ((".gguf",), "GGUF files", "GGUF is not served: download the model's safetensors version."),
    (("adapter_config.json",), "an adapter", "Merge it into its base model first: model.merge_and_unload()."),
    (_PICKLED, "pickled weights", FIX_PICKLES),
    ((".safetensors",), "safetensors files", FIX_AGAIN),
)
_FIX_RIGHTS = "Give the user that runs Heterodyne the right to read it, or give another directory."
_FIX_NO_DIRECTORY = "Give the directory that holds config.json and the safetensors files."
# What may be a model's name on the Hugging Face Hub: of whom, and which.
_HUB_NAME = re.compile(r"(?!\.)[\w.-]{1,96}/(?!\.)[\w.-]{1,96}", re.ASCII)
_FIX_TOKENIZER = "Save the tokenizer as a fast one: AutoTokenizer.from_pretrained(path).save_pretrained(path)."
_SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Describes what there is in a directory that was given as a model's.

    Attributes:
        path: the directory.
        names: the names of what is in it.
        model_folders: directories below it that have a config.json, the best to give first. Of a repository in the
            cache of Hugging Face these are its snapshots.
        exists: whether there is such a directory at all.
    """

    path: str
    names: Sequence[str] = ()
    model_folders: Sequence[str] = ()
    exists: bool = True


def check_file(
    name: str, *, directory: PurePath, file: PurePath, is_file: Callable[[], bool], listing: Callable[[], Listing]
) -> None:
    """Checks that the model directory has the file ``name``, and that it may be read as one of it.

    Args:
        directory, file: the real paths of both, without links.
        is_file: tells whether there is a file; it is asked only about a file that may be read.
        listing: looks at what the directory holds; it is called where the file is missing.

    Raises:
        InvalidModel: the file leads out of the directory, or is missing.
    """
    if not is_allowed(directory, file):
        raise leads_outside(name)
    if not is_file():
        raise missing_file(name, listing())


def no_directory(path: str, *, is_there: bool, missing: str) -> InvalidConfig | InvalidModel:
    """Makes the error for a path that is no directory: a file, or nothing at all.

    Args:
        missing: the part of ``path`` below what there is.
    """
    name = PurePath(path).name
    for endings, _, fix in _KINDS if is_there else ():
        if name.endswith(endings) and fix != FIX_AGAIN:
            return _refusal(f"{path} is a single file, not a model directory", fix)
    problem, fix = "is not a directory" if is_there else "does not exist", _FIX_NO_DIRECTORY
    if not is_there and _HUB_NAME.fullmatch(missing):
        fix = f"{fix} Nothing is downloaded: `hf download {missing}` prints the directory to give here."
    return InvalidConfig(field="model.path", value=path, problem=problem, fix=fix)


def unreadable(path: str, error: OSError) -> InvalidModel:
    """Makes the error for a directory, or a file in it, that the system refuses to read."""
    problem = f"{error.filename or path} cannot be read: {(error.strerror or str(error)).lower()}"
    return _refusal(problem, _FIX_RIGHTS if isinstance(error, PermissionError) else FIX_AGAIN)


def missing_file(name: str, listing: Listing) -> InvalidModel:
    """Makes the error for a file that a model directory must have and this one has not."""
    if not listing.exists:
        fix = "Put the model there: model.path is the same on all machines."
        return _refusal(f"{listing.path} is no directory of this machine", fix)
    cached = _cached(listing)
    if cached is not None:
        return cached
    if name in listing.names:
        problem = f"{listing.path} has a link in place of {name}, to a file that is not there"
        return _refusal(problem, FIX_AGAIN)
    held, fix = _instead(name, listing)
    return _refusal(f"{listing.path} has no {name}{held}", fix)


def no_weights(listing: Listing) -> InvalidModel:
    """Makes the error for a directory that holds neither a single file of weights nor an index."""
    pickled = sorted(name for name in listing.names if name.endswith(_PICKLED))
    if not pickled or any(name.endswith((".gguf", ".safetensors")) for name in listing.names):
        return missing_file(SINGLE_FILE, listing)
    problem = f"{listing.path} holds weights as pickles only ({_named(pickled)}), which can run code: none is loaded"
    return _refusal(problem, FIX_PICKLES)


def _cached(listing: Listing) -> InvalidModel | None:
    """Makes the error for a directory of the Hugging Face cache that is no snapshot."""
    own_name = PurePath(listing.path).name
    repositories = sorted(name for name in listing.names if name.startswith(_CACHED))
    if own_name.startswith(_CACHED) and "snapshots" in listing.names:
        what = "is a repository in the cache of Hugging Face"
    elif own_name == "snapshots" and PurePath(listing.path).parent.name.startswith(_CACHED):
        what = "holds the snapshots of a repository in the cache of Hugging Face"
    elif repositories:
        problem = f"{listing.path} is the cache of Hugging Face, with {_named(repositories)}"
        return _refusal(problem, f"Give a snapshot of one: {listing.path}/{repositories[0]}/snapshots/REVISION.")
    else:
        return None
    if not listing.model_folders:
        return _refusal(f"{listing.path} {what}, and none of its snapshots has a config.json", FIX_AGAIN)
    return _refusal(f"{listing.path} {what}, not a model directory", f"Give its snapshot: {listing.model_folders[0]}")


def _instead(name: str, listing: Listing) -> tuple[str, str]:
    """Returns what the directory holds instead of the file, in brackets, and the fix."""
    if name == "tokenizer.json":
        slow = [other for other in _SLOW_TOKENIZERS if other in listing.names]
        return (f" (it holds {_named(slow)})", _FIX_TOKENIZER) if slow else ("", FIX_AGAIN)
    if listing.model_folders:
        folders = [PurePath(folder).name for folder in listing.model_folders]
        held = "the model directory" if len(folders) == 1 else "model directories:"
        return f" (it holds {held} {_named(folders)})", f"Give {listing.model_folders[0]}"
    for endings, what, fix in _KINDS:
        names = sorted(other for other in listing.names if other.endswith(endings))
        if names:
            return f" (it holds {what}: {_named(names)})", fix
    if not listing.names:
        return " (it is empty)", _FIX_NO_DIRECTORY
    return "", FIX_AGAIN


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown}, …"


def _refusal(problem: str, fix: str) -> InvalidModel:
    return InvalidModel(field="model.path", problem=problem, fix=fix)
