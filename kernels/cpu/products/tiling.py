"""How a product's input and sums are cut into tiles: pure, for any target.

Shapes: T tokens of a batch, I inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial

from kernels.cpu.machine.target import Target

_MOST_SUMS = 24  # so that some registers are left for masks, too
# The columns of a ticket: enough that tickets cost nothing, and so few that all threads end together and that they stay
# in the second-level cache while all tiles of rows are multiplied by them.
_MOST_UNIT, _UNITS_PER_THREAD = 8, 8
_MOST_UNIT_BYTES = 1 << 20


class Layout(Enum):
    """How the input lies in memory, where a tile has several rows; one row lies as it is."""

    ROWS = "[T, I] in bfloat16"
    PAIRS = "[tiles, I / 2, rows, 2] in bfloat16"
    FLOATS = "[tiles, I, rows] in float32"


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of a target's tiles.

    Attributes:
        few: for small batches, which are one tile: the most rows that a tile may have, and its columns.
        many: the same for the tiles of larger batches.
    """

    few: tuple[tuple[int, int], ...]
    many: tuple[int, int]

    def shape_for(self, num_tokens: int) -> tuple[int, int, int]:
        """Returns the number of tiles for a batch, the rows of each, and its columns. Tiles have equally many rows."""
        for most_rows, columns in self.few:
            if num_tokens <= most_rows:
                return 1, num_tokens, columns
        most_rows, columns = self.many
        num_tiles = -(-num_tokens // most_rows)
        return num_tiles, -(-num_tokens // num_tiles), columns


@cache
def shapes(target: Target) -> Shapes:
    """Returns the shapes with as many sums as fit the target's registers, beside a weight of each column and an input.

    With fewer a tile would wait for its own sums; with all rows in one tile the weight is read once. Few rows are bound
    by memory, which is faster with one or two streams than with many. Where pairs are multiplied, the shapes are those
    that were fastest on Zen 4.
    """
    if target.multiplies_pairs:
        return Shapes(few=((1, 1), (4, 2), (6, 4), (8, 3), (12, 2), (24, 1)), many=(8, 3))
    vectors = (target.registers - 2) // target.registers_per_column
    fitting = [(min(vectors // columns - 1, _MOST_SUMS // columns), columns) for columns in (4, 3, 2, 1)]
    few = [(rows, columns) for rows, columns in fitting if rows > 1]
    one_row = (1, 2) if vectors >= 4 else (1, 1)
    return Shapes(few=(one_row, *few), many=max(few, key=partial(_products_per_operand, target)))


def _products_per_operand(target: Target, shape: tuple[int, int]) -> float:
    """Returns how many vectors are multiplied for each input loaded, and each vector of weights loaded or widened."""
    rows, columns = shape
    vectors = columns * target.registers_per_column
    return rows * vectors / (rows + 2 * vectors)


MATRIX_SHAPES = Shapes(few=((32, 2),), many=(32, 2))
"""The shapes of a matrix unit (AMX), whose tiles have one or two registers of 16 tokens."""


def unit_for(num_columns: int, columns: int, num_threads: int, column_bytes: int) -> int:
    """Returns the columns of a ticket: whole tiles of ``columns``, unless a thread would get none then.

    Args:
        num_columns: the columns of the product.
        columns: those of a tile.
        num_threads: how many threads share it.
        column_bytes: the bytes of a column of the weight.
    """
    if num_columns < num_threads * columns:
        return max(1, num_columns // (num_threads * _UNITS_PER_THREAD))
    share = min(num_columns // (num_threads * _UNITS_PER_THREAD), _MOST_UNIT, _MOST_UNIT_BYTES // column_bytes)
    return max(1, share // columns) * columns


MOST_ROWS = 32
"""The most rows of any tile."""


def tile_name(rows: int, columns: int) -> str:
    """Returns the name of the function of a tile of so many rows, or registers of rows, and columns."""
    return f"tile_{rows}_{columns}"


def used_shapes(shape_for: Callable[[int], tuple[int, int, int]], most_tokens: int) -> list[tuple[int, int]]:
    """Returns the rows and columns of all tiles that batches of up to ``most_tokens`` use.

    With each come the tiles of one column, which are for the columns that remain.
    """
    used = {shape_for(num_tokens)[1:] for num_tokens in range(1, most_tokens + 1)}
    return sorted(used | {(rows, 1) for rows, _ in used})
