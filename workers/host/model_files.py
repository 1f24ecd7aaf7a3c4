"""Opens the files of a model directory, on a worker's own machine. Only files below it are opened, or those its own
cache has for it: :func:`placement.model.checkpoint_files.is_allowed` says which links may be followed.
"""

from pathlib import Path

from placement.errors import InvalidModel
from placement.model.checkpoint_files import is_allowed, leads_outside, parse_object, too_large
from placement.model.missing_files import Listing, missing_file
from placement.model.tokenizer_json import TOKENIZER, CompleteTokenizer, read_tokenizer

_FIX = "Give a directory in the Hugging Face layout that this node can read."


def inside(directory: Path, name: str) -> Path:
    """Returns the path of a file of the directory. Raises InvalidModel where it is missing or leads out."""
    file = directory / name
    if not file.is_file():
        raise missing_file(name, list_directory(directory))
    if not is_allowed(directory.resolve(), file.resolve()):
        raise leads_outside(name)
    return file


def list_directory(directory: Path) -> Listing:
    """Looks at what the directory holds, for an error's text."""
    names = sorted(file.name for file in directory.glob("*"))
    return Listing(path=str(directory), names=names, exists=directory.is_dir())


def read_bytes(directory: Path, name: str, limit_bytes: int) -> bytes:
    """Reads a file of the directory that has at most ``limit_bytes``. Raises InvalidModel."""
    file = inside(directory, name)
    try:
        with file.open("rb") as opened:
            data = opened.read(limit_bytes + 1)
    except OSError as error:
        problem = f"cannot be read ({type(error).__name__})"
        raise InvalidModel(field=name, value=str(file), problem=problem, fix=_FIX) from error
    if len(data) > limit_bytes:
        raise too_large(name, file.stat().st_size, limit_bytes=limit_bytes)
    return data


def read_json(directory: Path, name: str, limit_bytes: int) -> dict[str, object]:
    """Reads the JSON object of a file. Raises InvalidModel."""
    return parse_object(name, read_bytes(directory, name, limit_bytes))


def read_tokenizer_of(directory: Path, *, vocab_size: int) -> CompleteTokenizer:
    """Reads the tokenizer of a model with so many rows. Raises InvalidModel."""

    def read(name: str, limit_bytes: int) -> bytes | None:
        is_needed = name == TOKENIZER or (directory / name).exists()
        return read_bytes(directory, name, limit_bytes) if is_needed else None

    return read_tokenizer(read, vocab_size=vocab_size)
