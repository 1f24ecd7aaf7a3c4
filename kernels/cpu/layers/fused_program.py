"""Writes a decoder's layers as operations of a program: see :mod:`kernels.cpu.layers.fused`.

Attention and feed-forward of a layer, in this order, each give an update that may be a partial result of the rank's,
to be all-reduced. What follows the all-reduce, up to the next product, can also be run for some rows alone.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import LayerCache
from kernels.cpu.attention import paged
from kernels.cpu.layers.layer_works import Buffers, Layer, Writer
from kernels.cpu.layers.partial import SumWork
from kernels.cpu.layers.program import Program

_OPERATIONS_PER_LAYER = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings that all layers have in common: see :func:`kernels.cpu.layers.fused.fuse`."""

    head_dim: int
    eps: float
    scale: float
    activation: str
    ladder: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledLayers:
    """The program for a number of tokens, and numbers of its operations.

    Attributes:
        sum_work: all-reduces within the program, and is kept as long as the program.
        attention: the operation of each layer's attention; empty for a rank without heads.
        sums: the operations before which an update must be all-reduced, two for each layer.
        finished: for each of ``sums``, the operation that reads the norm of the sum.
    """

    program: Program
    sum_work: SumWork | None
    attention: tuple[int, ...]
    sums: tuple[int, ...]
    finished: tuple[int, ...]

    def end(self, num_layers: int | None) -> int:
        """Returns the number of the operation that ends the first ``num_layers`` layers; None: all layers."""
        return len(self.program) if num_layers is None else self.sums[: 2 * num_layers][-1]


def updates(buffers: Buffers, *, ladder: bool) -> tuple[Tensor, Tensor]:
    """Returns the buffers of an attention's and of a feed-forward's update.

    In a ladder they differ, since the update before is still to be added.
    """
    return buffers.update, buffers.later if ladder else buffers.update


def compile_layers(
    layers: Sequence[Layer],
    caches: Sequence[LayerCache],
    writer: Writer,
    settings: Settings,
    sum_work: SumWork | None,
) -> CompiledLayers:
    """Writes all layers, from the residual to the residual and the last update.

    Args:
        writer: writes to an empty program for :func:`max_operations`.
        sum_work: all-reduces each update within the program; None: the program stops for that. Not of a ladder.
    """
    assert sum_work is None or not settings.ladder, "a ladder's sums are not needed at once"
    program, buffers = writer.program, writer.buffers
    attended, fed = updates(buffers, ladder=settings.ladder)
    attention, sums, finished = [], [], []
    writer.norm(layers[0].attention_norm, attended, adds=False)
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        if layer.qkv is not None:
            writer.product(layer.qkv, buffers.normed, buffers.qkv)
            writer.rotate(layer, cache)
            attention.append(program.add(*paged.no_attention(cache)))
        writer.reduced_product(layer.output, buffers.attended, attended, sum_work)
        sums.append(len(program))
        _finish(writer, layers, 2 * index, ladder=settings.ladder)
        finished.append(len(program))
        if layer.gate_up is not None:
            writer.product(layer.gate_up, buffers.normed, buffers.gate_up)
            writer.activate(settings.activation)
        writer.reduced_product(layer.down, buffers.activated, fed, sum_work)
        sums.append(len(program))
        _finish(writer, layers, 2 * index + 1, ladder=settings.ladder)
        finished.append(len(program))
    return CompiledLayers(
        program=program, sum_work=sum_work, attention=tuple(attention), sums=tuple(sums), finished=tuple(finished)
    )


class Finisher:
    """Runs what follows an all-reduce for some rows of the buffers alone. Not of a ladder. For one thread at a time."""

    def __init__(self, layers: Sequence[Layer], settings: Settings, max_programs: int) -> None:
        """``max_programs`` is how many programs are kept, one for each range of rows."""
        self._layers = layers
        self._settings = settings
        self._max_programs = max_programs
        # What follows all-reduce n is the operations from the n-th number to the next.
        self._programs: OrderedDict[tuple[int, int, int], tuple[Program, list[int]]] = OrderedDict()

    def clear(self) -> None:
        """Drops the programs, which hold addresses of the buffers."""
        self._programs.clear()

    def run(self, buffers: Buffers, number: int, first_row: int, num_rows: int) -> None:
        """Runs what follows the all-reduce ``number`` for some rows, on the caller's team of threads."""
        if not num_rows:
            return
        num_threads = torch.get_num_threads()
        key = (first_row, num_rows, num_threads)
        if key in self._programs:
            self._programs.move_to_end(key)
        else:
            if len(self._programs) == self._max_programs:
                self._programs.popitem(last=False)
            self._programs[key] = self._compile(buffers.from_row(first_row), num_rows, num_threads)
        program, edges = self._programs[key]
        if edges[number + 1] > edges[number]:
            program.run(num_threads, edges[number], edges[number + 1])

    def _compile(self, buffers: Buffers, num_rows: int, num_threads: int) -> tuple[Program, list[int]]:
        program = Program(4 * len(self._layers))
        writer = make_writer(program, buffers, num_rows, num_threads, self._settings)
        edges = [0]
        for number in range(2 * len(self._layers)):
            _finish(writer, self._layers, number, ladder=False)
            edges.append(len(program))
        return program, edges


def make_writer(program: Program, buffers: Buffers, num_rows: int, num_threads: int, settings: Settings) -> Writer:
    """Makes a writer of operations on the first ``num_rows`` rows of the buffers."""
    return Writer(program, buffers, num_rows, num_threads, settings.head_dim, settings.eps)


def max_operations(layers: Sequence[Layer], num_column_tiles: int) -> int:
    """Returns the most operations of a program: for each column tile of two all-reduces a layer there are two."""
    return (_OPERATIONS_PER_LAYER + 4 * num_column_tiles) * len(layers)


def _finish(writer: Writer, layers: Sequence[Layer], number: int, *, ladder: bool) -> None:
    """Writes what follows an all-reduce: adding the sum to the residual and norming it.

    After the last one only the update's own norm follows.
    """
    attended, fed = updates(writer.buffers, ladder=ladder)
    index, is_fed = divmod(number, 2)
    layer = layers[index]
    if not is_fed:
        writer.norm_update(layer.attention_post_norm)
        writer.norm(layer.ffn_norm, fed if ladder else attended, adds=index > 0 or not ladder)
        return
    writer.norm_update(layer.ffn_post_norm)
    if index + 1 < len(layers):
        writer.norm(layers[index + 1].attention_norm, attended if ladder else fed, adds=True)
