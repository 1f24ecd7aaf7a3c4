"""What the null engine and its watchers share: a file of 64-bit numbers that every process maps.

A step's number is the id of the tokens it gives, so whoever sees a token finds when its step ended.
"""

import mmap
from pathlib import Path
from typing import Self

# Steps that are told apart, and the first id that stands for one: the ids after it are letters in the vocabulary.
NUM_STAMPS = 16384
FIRST_ID = 512
_STEP_NS, _STEPS, _STAMPS = 0, 1, 2
_ITEM = 8


class Board:
    """The mapped file. One writer of stamps, one writer of the step time, any number of readers."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._numbers = memoryview(self._map).cast("q")

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new board of zeros."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(_ITEM * (_STAMPS + NUM_STAMPS)))
        return cls(path)

    @property
    def step_ns(self) -> int:
        """How long a step shall take."""
        return self._numbers[_STEP_NS]

    @step_ns.setter
    def step_ns(self, value: int) -> None:
        self._numbers[_STEP_NS] = value

    @property
    def steps(self) -> int:
        """Steps that have ended."""
        return self._numbers[_STEPS]

    def stamp(self, now_ns: int) -> int:
        """A step ended. Returns the id of its tokens."""
        step = self._numbers[_STEPS]
        self._numbers[_STAMPS + step % NUM_STAMPS] = now_ns
        self._numbers[_STEPS] = step + 1
        return FIRST_ID + step % NUM_STAMPS

    def ended_ns(self, token_id: int) -> int:
        """When the step of that token ended."""
        return self._numbers[_STAMPS + token_id - FIRST_ID]
