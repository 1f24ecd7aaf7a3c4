"""Opens the files of a model directory, on a worker's own machine. Only files below it are opened, or those its own
cache has for it: :func:`placement.model.checkpoint_files.is_allowed` says which links may be followed.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from placement.model.checkpoint_files import parse_object, too_large
from placement.model.missing_files import Listing, check_file, unreadable
from placement.model.tokenizer_json import CompleteTokenizer, read_tokenizer


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


def inside(directory: Path, name: str) -> Path:
    """Returns the path of a file of the directory. Raises InvalidModel where it is missing or leads out."""
    path = directory / name
    with readable(directory):
        real, file = (Path(os.path.realpath(each)) for each in (directory, path))
        check_file(name, directory=real, file=file, is_file=path.is_file, listing=partial(list_directory, directory))
    return path


def list_directory(directory: Path) -> Listing:
    """Looks at what the directory holds, for an error's text. Raises InvalidModel where that cannot be read."""
    with readable(directory):
        is_there = directory.is_dir()
        names = sorted(file.name for file in directory.iterdir()) if is_there else []
    return Listing(path=str(directory), names=names, exists=is_there)


def read_bytes(directory: Path, name: str, limit_bytes: int) -> bytes:
    """Reads a file of the directory that has at most ``limit_bytes``. Raises InvalidModel."""
    path = inside(directory, name)
    with readable(path), path.open("rb") as file:
        data = file.read(limit_bytes + 1)
        num_bytes = os.fstat(file.fileno()).st_size
    if len(data) > limit_bytes:
        raise too_large(name, num_bytes, limit_bytes=limit_bytes)
    return data


def read_json(directory: Path, name: str, limit_bytes: int) -> dict[str, object]:
    """Reads the JSON object of a file. Raises InvalidModel."""
    return parse_object(name, read_bytes(directory, name, limit_bytes))


def read_tokenizer_of(directory: Path, *, vocab_size: int) -> CompleteTokenizer:
    """Reads the tokenizer of a model with so many rows. Raises InvalidModel."""
    return read_tokenizer(partial(read_bytes, directory), partial(exists, directory), vocab_size=vocab_size)
