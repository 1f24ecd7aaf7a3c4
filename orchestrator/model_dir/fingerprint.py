"""Digests the files of this machine's model directory, for workers to compare with those of theirs."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from orchestrator.model_dir.directory import exists, inside, read_bytes, readable
from placement.model.fingerprint import ReadAt, fingerprint


def read_fingerprint(directory: Path) -> dict[str, bytes]:
    """Returns the digest of every file that serving the model uses, by the file's name. Raises InvalidModel."""
    real = directory.resolve()
    return fingerprint(partial(read_bytes, real), partial(exists, real), partial(_opened, real))


@contextlib.contextmanager
def _opened(directory: Path, name: str) -> Iterator[tuple[int, ReadAt]]:
    path = inside(directory, name)
    with readable(path), path.open("rb") as file:
        number = file.fileno()
        yield os.fstat(number).st_size, lambda start, length: os.pread(number, length, start)
