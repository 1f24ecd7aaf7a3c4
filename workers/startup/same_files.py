"""Checks that the files of this machine's model directory are those that the orchestrator read on its own machine.

Where nothing is expected, nothing is checked.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from placement.model.fingerprint import ReadAt, check_descriptions, check_weights
from placement.model.quantization import LinearFormat
from placement.model.weights import TensorSlice
from workers.host.model_files import exists, inside, read_bytes, readable
from workers.startup.checkpoint import weight_files


def check_same_descriptions(path: Path, expected: Mapping[str, bytes], *, tokenizer: bool) -> None:
    """Checks the files beside the weights; those of the tokenizer where it is used. Raises InvalidModel."""
    if expected:
        check_descriptions(path, expected, partial(read_bytes, path), partial(exists, path), tokenizer=tokenizer)


def check_same_weights(
    path: Path, expected: Mapping[str, bytes], slices: Sequence[TensorSlice], linear: LinearFormat | None
) -> None:
    """Checks the safetensors files that hold the slices. A rank needs no others. Raises InvalidModel."""
    if expected:
        check_weights(path, expected, weight_files(path, slices, linear), partial(_opened, path))


@contextlib.contextmanager
def _opened(directory: Path, name: str) -> Iterator[tuple[int, ReadAt]]:
    path = inside(directory, name)
    with readable(path), path.open("rb") as file:
        number = file.fileno()
        yield os.fstat(number).st_size, lambda start, length: os.pread(number, length, start)
