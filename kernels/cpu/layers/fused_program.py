"""Writes a decoder's layers as works of a program: see :mod:`kernels.cpu.layers.fused`.

Two works of a layer end in what may be a part of a sum over ranks: its attention and its feed-forward, in this order.
What is done with each sum, up to the next product, can be run for some rows alone, too.
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

_WORKS_PER_LAYER = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all layers have in common, as :func:`kernels.cpu.layers.fused.fuse` says."""

    head_dim: int
    eps: float
    scale: float
    activation: str
    ladder: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """The program for a number of tokens.

    Attributes:
        attention: the number of each layer's attention in it; of a rank without heads, none.
        sum_work: as long as the program is kept.
        sums: where an update must be a sum, which other ranks have parts of: two numbers a layer.
        finished: for each of ``sums``, where that goes on which needs the sum's norm.
    """

    program: Program
    sum_work: SumWork | None
    attention: tuple[int, ...]
    sums: tuple[int, ...]
    finished: tuple[int, ...]

    def end(self, num_layers: int | None) -> int:
        """Where the first layers end; None: all do."""
        return len(self.program) if num_layers is None else self.sums[: 2 * num_layers][-1]


def updates(buffers: Buffers, *, ladder: bool) -> tuple[Tensor, Tensor]:
    """Where an attention's and a feed-forward's update goes: on a ladder the one before is still to be added."""
    return buffers.update, buffers.later if ladder else buffers.update


def compile_layers(
    layers: Sequence[Layer],
    caches: Sequence[LayerCache],
    writer: Writer,
    settings: Settings,
    sum_work: SumWork | None,
) -> Compiled:
    """All layers, from residual to residual and update.

    Args:
        writer: of an empty program that has room: see :func:`max_works`.
        sum_work: sums each update within the program; not on a ladder.
    """
    assert sum_work is None or not settings.ladder, "a ladder's sums are not needed at once"
    made, buffers = writer.program, writer.buffers
    attended, fed = updates(buffers, ladder=settings.ladder)
    attention, sums, finished = [], [], []
    writer.norm(layers[0].attention_norm, attended, adds=False)
    for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        if layer.qkv is not None:
            writer.product(layer.qkv, buffers.normed, buffers.qkv)
            writer.turn(layer, cache)
            attention.append(made.add(*paged.no_attention(cache)))
        writer.summed_product(layer.output, buffers.attended, attended, sum_work)
        sums.append(len(made))
        _finish(writer, layers, 2 * index, ladder=settings.ladder)
        finished.append(len(made))
        if layer.gate_up is not None:
            writer.product(layer.gate_up, buffers.normed, buffers.gate_up)
            writer.activate(settings.activation)
        writer.summed_product(layer.down, buffers.activated, fed, sum_work)
        sums.append(len(made))
        _finish(writer, layers, 2 * index + 1, ladder=settings.ladder)
        finished.append(len(made))
    return Compiled(
        program=made, sum_work=sum_work, attention=tuple(attention), sums=tuple(sums), finished=tuple(finished)
    )


class Finisher:
    """What is done with sums, for rows of the buffers alone; not of a ladder. For one thread at a time."""

    def __init__(self, layers: Sequence[Layer], settings: Settings, max_programs: int) -> None:
        """``max_programs``: that are kept, one for each range of rows."""
        self._layers = layers
        self._settings = settings
        self._max_programs = max_programs
        # What is done with the sum ``n`` are the works from the ``n``-th number to the next.
        self._programs: OrderedDict[tuple[int, int, int], tuple[Program, list[int]]] = OrderedDict()

    def clear(self) -> None:
        """Forgets the programs, which hold addresses of the buffers."""
        self._programs.clear()

    def run(self, buffers: Buffers, number: int, first_row: int, num_rows: int) -> None:
        """For the rows that begin at ``first_row``, with the threads of the caller."""
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
        made, edges = self._programs[key]
        if edges[number + 1] > edges[number]:
            made.run(num_threads, edges[number], edges[number + 1])

    def _compile(self, buffers: Buffers, num_rows: int, num_threads: int) -> tuple[Program, list[int]]:
        made = Program(4 * len(self._layers))
        its = writer(made, buffers, num_rows, num_threads, self._settings)
        edges = [0]
        for number in range(2 * len(self._layers)):
            _finish(its, self._layers, number, ladder=False)
            edges.append(len(made))
        return made, edges


def writer(made: Program, buffers: Buffers, num_rows: int, num_threads: int, settings: Settings) -> Writer:
    """Of works for so many rows of the buffers."""
    return Writer(made, buffers, num_rows, num_threads, settings.head_dim, settings.eps)


def max_works(layers: Sequence[Layer], num_strips: int) -> int:
    """That a program of the layers may have: a product and a sum for each strip of two sums a layer."""
    return (_WORKS_PER_LAYER + 4 * num_strips) * len(layers)


def _finish(writer: Writer, layers: Sequence[Layer], number: int, *, ladder: bool) -> None:
    """What is done with the sum of an attention or a feed-forward: to residual and normed; of the last, to update."""
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
