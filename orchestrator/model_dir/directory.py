"""Opens the files of a model directory. Only files below it are opened, or those its own cache has for it.

:func:`placement.model.checkpoint_files.is_allowed` says which links may be followed.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from placement.model.checkpoint_files import parse_object, too_large
from placement.model.missing_files import Listing, check_file, unreadable
from placement.model.tokenizer_json import CompleteTokenizer, read_tokenizer

_MOST_LISTED = 4096
_CONFIG = "config.json"
_SNAPSHOTS, _MAIN = "snapshots", Path("refs", "main")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Makes of an error of the system, about a directory or a file in it, an InvalidModel that says so."""
    try:
        yield
    except OSError as error:
        raise unreadable(str(path), error) from error


def exists(directory: Path, name: str) -> bool:
    """Tells whether the directory has a file of this name. Raises InvalidModel where that cannot be told."""
    with readable(directory):
        return (directory / name).exists()


def read_json_if_there(directory: Path, name: str, limit_bytes: int) -> dict[str, Any]:
    """Reads the JSON object of a file; it is empty where there is no such file. Raises InvalidModel."""
    return read_json(directory, name, limit_bytes) if exists(directory, name) else {}


def read_json(directory: Path, name: str, limit_bytes: int) -> dict[str, Any]:
    """Reads the JSON object of a file. Raises InvalidModel."""
    return parse_object(name, read_bytes(directory, name, limit_bytes))


def read_tokenizer_of(directory: Path, *, vocab_size: int) -> CompleteTokenizer:
    """Reads the tokenizer of a model with so many rows. Raises InvalidModel."""
    directory = directory.resolve()
    return read_tokenizer(partial(read_bytes, directory), partial(exists, directory), vocab_size=vocab_size)


def read_bytes(directory: Path, name: str, limit_bytes: int) -> bytes:
    """Reads a file of the directory that has at most ``limit_bytes``. Raises InvalidModel."""
    path = inside(directory, name)
    with readable(path), path.open("rb") as file:
        data = file.read(limit_bytes + 1)
        num_bytes = os.fstat(file.fileno()).st_size
    if len(data) > limit_bytes:
        raise too_large(name, num_bytes, limit_bytes=limit_bytes)
    return data


def inside(directory: Path, name: str) -> Path:
    """Returns the real path of a file of the directory, which is a real path itself. Raises InvalidModel."""
    with readable(directory):
        path = Path(os.path.realpath(directory / name))  # which does not mind a link to itself
        check_file(
            name, directory=directory, file=path, is_file=path.is_file, listing=partial(list_directory, directory)
        )
    return path


def list_directory(directory: Path) -> Listing:
    """Looks at what the directory holds, for an error's text. Raises InvalidModel where that cannot be read."""
    with readable(directory):
        entries = sorted(directory.iterdir())[:_MOST_LISTED]
        folders = [entry for entry in entries if entry.is_dir()]
        snapshots = directory / _SNAPSHOTS
        if snapshots.is_dir():
            main = _main_revision(directory)
            folders += sorted(snapshots.iterdir(), key=lambda folder: (folder.name != main, folder))
    return Listing(
        path=str(directory),
        names=tuple(entry.name for entry in entries),
        # A folder that cannot be read is none to propose.
        model_folders=tuple(str(folder) for folder in folders if os.path.isfile(folder / _CONFIG)),
    )


def _main_revision(repository: Path) -> str | None:
    """Returns the revision that a repository of the cache was last downloaded at; None where it does not say."""
    try:
        return (repository / _MAIN).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
