"""Opens the files of a model directory. Only files below it are opened, or those its own cache has for it.

:func:`placement.model.checkpoint_files.is_allowed` says which links may be followed.
"""

from pathlib import Path
from typing import Any

from placement.errors import InvalidModel
from placement.model.checkpoint_files import (
    FIX_AGAIN,
    is_allowed,
    leads_outside,
    parse_object,
    too_large,
)
from placement.model.missing_files import Listing, missing_file
from placement.model.tokenizer_json import TOKENIZER, CompleteTokenizer, read_tokenizer

_MOST_LISTED = 4096
_CONFIG = "config.json"
_SNAPSHOTS, _MAIN = "snapshots", Path("refs", "main")


def read_json_if_there(directory: Path, name: str, limit_bytes: int) -> dict[str, Any]:
    """Reads the JSON object of a file; it is empty where there is no such file. Raises InvalidModel."""
    return read_json(directory, name, limit_bytes) if (directory / name).exists() else {}


def read_json(directory: Path, name: str, limit_bytes: int) -> dict[str, Any]:
    """Reads the JSON object of a file. Raises InvalidModel."""
    return parse_object(name, read_bytes(directory, name, limit_bytes))


def read_tokenizer_of(directory: Path, *, vocab_size: int) -> CompleteTokenizer:
    """Reads the tokenizer of a model with so many rows. Raises InvalidModel."""
    directory = directory.resolve()

    def read(name: str, limit_bytes: int) -> bytes | None:
        is_needed = name == TOKENIZER or (directory / name).exists()
        return read_bytes(directory, name, limit_bytes) if is_needed else None

    return read_tokenizer(read, vocab_size=vocab_size)


def read_bytes(directory: Path, name: str, limit_bytes: int) -> bytes:
    """Reads a file of the directory that has at most ``limit_bytes``. Raises InvalidModel."""
    path = inside(directory, name)
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        problem = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise InvalidModel(field=name, problem=problem, fix=FIX_AGAIN) from error
    if len(data) > limit_bytes:
        raise too_large(name, path.stat().st_size, limit_bytes=limit_bytes)
    return data


def inside(directory: Path, name: str) -> Path:
    """Returns the real path of a file of the directory, which is a real path itself. Raises InvalidModel."""
    path = (directory / name).resolve()
    if not is_allowed(directory, path):
        raise leads_outside(name)
    if not path.is_file():
        raise missing_file(name, list_directory(directory))
    return path


def list_directory(directory: Path) -> Listing:
    """Looks at what the directory holds, for an error's text."""
    entries = sorted(directory.iterdir())[:_MOST_LISTED]
    folders = [entry for entry in entries if entry.is_dir()]
    snapshots = directory / _SNAPSHOTS
    if snapshots.is_dir():
        folders += sorted(snapshots.iterdir(), key=lambda folder: (folder.name != _main_revision(directory), folder))
    return Listing(
        path=str(directory),
        names=tuple(entry.name for entry in entries),
        model_folders=tuple(str(folder) for folder in folders if (folder / _CONFIG).is_file()),
    )


def _main_revision(repository: Path) -> str | None:
    """Returns the revision that a repository of the cache was last downloaded at; None where it does not say."""
    try:
        return (repository / _MAIN).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
