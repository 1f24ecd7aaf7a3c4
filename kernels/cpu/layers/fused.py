"""A decoder's layers as one compiled program: all that happens between embedding and final norm, without Python.

For bfloat16 on CPUs that :mod:`kernels.cpu.products` has code for. The operations are the same as when they are called
one by one, and so are the bits, except for the norms of heads, which are plain torch when called one by one.

Shapes: T tokens of a batch, E hidden size, F feed-forward size, H query heads, K KV heads, D head dimension.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from kernels.attention import Attend, AttentionPlan, LayerCache, PendingAttention, Window
from kernels.cpu.attention import paged
from kernels.cpu.layers.fused_program import (
    CompiledLayers,
    Finisher,
    Settings,
    compile_layers,
    make_writer,
    max_operations,
    updates,
)
from kernels.cpu.layers.layer_works import Buffers, Layer, RopeTables
from kernels.cpu.layers.partial import Finish, Partial, SumWork
from kernels.cpu.layers.program import Program
from kernels.cpu.layers.supported import DecoderLayer, supported_layer
from kernels.cpu.rows import rows

# How many programs are kept, one for each number of tokens: enough for the decodes of a busy server, and some chunks.
_MOST_PROGRAMS = 128
# Buffers grow by this many tokens at a time, since growing them drops all programs.
_ROWS_AT_ONCE = 64


def fuse(
    layers: Sequence[DecoderLayer], *, head_dim: int, eps: float, scale: float, activation: str, ladder: bool = False
) -> "FusedLayers | None":
    """Makes one program of the layers; returns None where a part of them has no compiled code.

    Args:
        layers: the layers in order, at least one.
        head_dim: D.
        eps: the constant that every norm adds to the mean square.
        scale: the factor of the attention's scores.
        activation: the feed-forward layers' activation, by its name in :class:`placement.model.specs.ModelSpec`.
        ladder: see :class:`placement.model.specs.ModelSpec`.
    """
    if activation not in rows.ACTIVATIONS or head_dim % 32:
        return None
    fused = [layer for layer in map(supported_layer, layers) if layer is not None]
    if len(fused) < len(layers):
        return None
    assert len({(layer.qkv is None, layer.down is None) for layer in fused}) == 1, "a rank has heads in all its layers"
    settings = Settings(head_dim=head_dim, eps=eps, scale=scale, activation=activation, ladder=ladder)
    return FusedLayers(fused, settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The buffers and tables that one run of the layers works with.

    Attributes:
        buffers: the memory of its rows, which begin at ``first_row`` of all.
        kept: memory whose addresses the program has, and which must live until the run ends.
    """

    compiled: CompiledLayers
    buffers: Buffers
    first_row: int
    num_tokens: int
    num_threads: int
    kept: list[object]


class _Stop(IntEnum):
    """Says why a program stops before an operation; of several reasons the first comes first."""

    SUM = 0
    """Ranks are to all-reduce."""
    WRITTEN = 1
    """A layer's KV is written, and somebody wants to know."""
    ATTENTION = 2
    """Attention is computed by somebody else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stops:
    """The reasons for which a program stops."""

    sums: bool = False
    attends: bool = False
    tells: bool = False

    def of(self, compiled: CompiledLayers, end: int) -> list[tuple[int, _Stop, int]]:
        """Returns the operations before which a program stops up to ``end``, why, and the layer; 0 for a sum."""
        stops = [(stop, _Stop.SUM, 0) for stop in compiled.sums] if self.sums else []
        for kind, wanted in ((_Stop.WRITTEN, self.tells), (_Stop.ATTENTION, self.attends)):
            stops += [(stop, kind, layer) for layer, stop in enumerate(compiled.attention)] if wanted else []
        return sorted(stop for stop in stops if stop[0] <= end)


class FusedLayers:
    """The layers of one decoder as compiled programs. For one thread at a time."""

    def __init__(self, layers: Sequence[Layer], settings: Settings) -> None:
        """See :func:`fuse`."""
        self._layers = layers
        self._settings = settings
        self._buffers = self._allocate(0)
        self._programs: OrderedDict[tuple[object, ...], CompiledLayers] = OrderedDict()
        self._finisher = Finisher(layers, settings, _MOST_PROGRAMS)

    def takes(self, attention: Mapping[Window, AttentionPlan]) -> bool:
        """Tells whether the plans are of the variant whose attention the programs run."""
        return all(plan.tasks is not None for plan in attention.values())

    def reserve(self, num_tokens: int) -> None:
        """Makes sure that there is memory for the tokens of a step, or of its micro-batches together.

        Not while a step is running.
        """
        if num_tokens > self._buffers.num_tokens:
            self._programs.clear()  # they hold addresses of the buffers
            self._finisher.clear()
            del self._buffers  # before the new ones are allocated
            self._buffers = self._allocate(-(-num_tokens // _ROWS_AT_ONCE) * _ROWS_AT_ONCE)

    def _allocate(self, num_tokens: int) -> Buffers:
        return Buffers(self._layers, self._settings.head_dim, num_tokens, ladder=self._settings.ladder)

    def run(
        self,
        embedded: Tensor,
        caches: Sequence[LayerCache],
        slots: Tensor,
        rope: Mapping[Window, RopeTables],
        attention: Mapping[Window, AttentionPlan],
        *,
        sums: bool = False,
        sum_work: SumWork | None = None,
        attend: Attend | None = None,
        first_row: int = 0,
        num_layers: int | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Generator[Partial | PendingAttention, None, Tensor]:
        """Computes the last layer's output [T, E] of ``embedded`` [T, E], and writes KV to ``slots`` of ``caches``.

        Args:
            rope, attention: have an entry for each window that some layer has.
            sums: whether each attention and feed-forward gives a partial result. It is yielded, and the layers go on
                once the sum, or the finished rows, are in its place; in a ladder, once the sum before it is.
            sum_work: all-reduces within the program instead, so that nothing is yielded. Not of a ladder.
            attend: attends instead of the program, also to KV that others have; then there are no plans. Attention that
                is on its way is yielded, and the layers go on once it is there.
            first_row: the first row of the buffers to use, where another micro-batch has those before; it and the
                products' spare rows must be reserved.
            num_layers: computes only the first layers, for a measurement; the returned tensor is of no use.
            on_layer: is told how many layers have their KV written, each time that another has.
        """
        if not len(embedded):
            return embedded
        assert attend is not None or len(attention) == len(rope), "attention without a plan"
        assert sum_work is None or (sums and attend is None), "a program that sums does not stop"
        run = self._begin(embedded, caches, slots, rope, attention, first_row, sum_work)
        end = run.compiled.end(num_layers)
        if sum_work is not None:
            self._run_summing(run, end, sum_work, on_layer)
            return self._result(run, None)
        partial = yield from self._run_stopping(run, end, caches, sums=sums, attend=attend, on_layer=on_layer)
        return self._result(run, partial)

    def _result(self, run: _Run, partial: Partial | None) -> Tensor:
        """Returns the last layer's output, after its last partial result; None: there was none."""
        if partial is not None and partial.is_finished:
            assert partial.finish is not None
            return partial.finish.result
        return run.buffers.total(run.num_tokens, ladder=self._settings.ladder)

    def _run_stopping(
        self,
        run: _Run,
        end: int,
        caches: Sequence[LayerCache],
        *,
        sums: bool,
        attend: Attend | None,
        on_layer: Callable[[int], None] | None,
    ) -> Generator[Partial | PendingAttention, None, Partial | None]:
        """Runs a program that stops for what is not part of it; returns the last partial result, if there was one."""
        program, start, num_sums = run.compiled.program, 0, 0
        partial: Partial | None = None
        stops = _Stops(sums=sums, attends=attend is not None, tells=on_layer is not None)
        for stop, kind, layer in stops.of(run.compiled, end):
            if stop > start:
                program.run(run.num_threads, start, stop)
            start = stop
            if kind is _Stop.SUM:
                partial = self._partial(run, num_sums)
                yield partial
                start = run.compiled.finished[num_sums] if partial.is_finished else stop
                num_sums += 1
            elif kind is _Stop.WRITTEN:
                assert on_layer is not None
                on_layer(layer + 1)
            else:
                assert attend is not None
                yield from self._attend(attend, layer, run, caches)
                start = stop + 1
        if start < end:
            program.run(run.num_threads, start, end)
        if self._settings.ladder and sums:
            yield Partial(update=run.buffers.normed[:0])  # until the last sum is there
        return partial

    def _begin(
        self,
        embedded: Tensor,
        caches: Sequence[LayerCache],
        slots: Tensor,
        rope: Mapping[Window, RopeTables],
        attention: Mapping[Window, AttentionPlan],
        first_row: int,
        sum_work: SumWork | None,
    ) -> _Run:
        """Prepares memory and program for a run: see :meth:`run`."""
        assert embedded.dtype == caches[0].keys.dtype == torch.bfloat16, (embedded.dtype, caches[0].keys.dtype)
        num_tokens, num_threads = len(embedded), torch.get_num_threads()
        self.reserve(first_row + num_tokens)
        buffers = self._buffers.from_row(first_row)
        compiled = self._compiled(buffers, first_row, num_tokens, num_threads, caches, sum_work)
        buffers.fill(embedded, slots, rope)
        return _Run(
            compiled=compiled,
            buffers=buffers,
            first_row=first_row,
            num_tokens=num_tokens,
            num_threads=num_threads,
            kept=self._plan_attention(compiled, buffers, num_threads, caches, attention),
        )

    def _run_summing(self, run: _Run, end: int, sum_work: SumWork, on_layer: Callable[[int], None] | None) -> None:
        """Runs a program that all-reduces by itself. Raises what made an all-reduce fail."""
        stops = _Stops(tells=on_layer is not None).of(run.compiled, end)
        start = 0
        sum_work.begin()
        for stop, _, layer in stops:
            run.compiled.program.run(run.num_threads, start, stop, ended_by=sum_work.failed)
            start = stop
            if on_layer is not None and not sum_work.has_failed:
                on_layer(layer + 1)
        run.compiled.program.run(run.num_threads, start, end, ended_by=sum_work.failed)
        sum_work.end()

    def _partial(self, run: _Run, number: int) -> Partial:
        """Returns the partial result of an attention or a feed-forward, with what follows its sum.

        The last sum is added to the residual, and not normed.
        """
        buffers = run.buffers
        update = updates(buffers, ladder=self._settings.ladder)[number % 2][: run.num_tokens]
        if self._settings.ladder:
            return Partial(update=update)
        is_last = number + 1 == 2 * len(self._layers)
        result = torch.empty_like(update) if is_last else buffers.normed[: run.num_tokens]

        def finish_rows(start: int, stop: int) -> None:
            self._finisher.run(self._buffers, number, run.first_row + start, stop - start)
            if is_last:
                torch.add(buffers.residual[start:stop], update[start:stop], out=result[start:stop])

        return Partial(update=update, finish=Finish(result=result, rows=finish_rows))

    def _attend(
        self, attend: Attend, layer: int, run: _Run, caches: Sequence[LayerCache]
    ) -> Generator[PendingAttention, None, None]:
        """Calls ``attend`` for a layer's attention, in place of the program."""
        query, attended = (
            x[: run.num_tokens].view(run.num_tokens, -1, self._settings.head_dim)
            for x in (run.buffers.query, run.buffers.attended)
        )
        found = attend(layer, self._layers[layer].window, query, caches[layer], self._settings.scale)
        if not isinstance(found, Tensor):
            yield found
            found = found.result()
        attended.copy_(found)

    def _plan_attention(
        self,
        compiled: CompiledLayers,
        buffers: Buffers,
        num_threads: int,
        caches: Sequence[LayerCache],
        attention: Mapping[Window, AttentionPlan],
    ) -> list[object]:
        """Puts the step's plans into the program, and returns the memory that must live as long as they are used."""
        num_heads = self._layers[0].attended_size // self._settings.head_dim
        kept: list[object] = []
        for window, plan in attention.items() if num_heads else ():
            assert plan.tasks is not None, plan
            members = [i for i, layer in enumerate(self._layers) if layer.window == window]
            memory = paged.Workspace(caches[members[0]], num_heads, plan.tasks, num_threads)
            num_tickets = paged.num_tickets(plan.tasks, caches[members[0]].keys.shape[0])
            tickets = torch.zeros(len(members), num_tickets, dtype=torch.int64)
            kept += [memory, tickets]
            addresses = (buffers.query.data_ptr(), buffers.attended.data_ptr())
            for i, ticket in zip(members, tickets, strict=True):
                _, arguments = paged.attention(
                    caches[i], plan.tasks, self._settings.scale, memory, *addresses, ticket.data_ptr()
                )
                compiled.program.change(compiled.attention[i], arguments)
        return kept

    def _compiled(
        self,
        buffers: Buffers,
        first_row: int,
        num_tokens: int,
        num_threads: int,
        caches: Sequence[LayerCache],
        sum_work: SumWork | None,
    ) -> CompiledLayers:
        """Returns the program for a number of tokens, which is compiled where it is not among those kept."""
        places = ((x.keys.data_ptr(), x.values.data_ptr(), x.keys.shape[1]) for x in caches)
        num_column_tiles = 1 if sum_work is None else sum_work.num_column_tiles(buffers.update[:num_tokens])
        summed_by = 0 if sum_work is None else sum_work.failed  # an address that is unique while the program is kept
        key = (first_row, num_tokens, num_threads, summed_by, num_column_tiles, *places)
        if key in self._programs:
            self._programs.move_to_end(key)
        else:
            if len(self._programs) == _MOST_PROGRAMS:
                self._programs.popitem(last=False)
            program = Program(max_operations(self._layers, num_column_tiles))
            writer = make_writer(program, buffers, num_tokens, num_threads, self._settings)
            self._programs[key] = compile_layers(self._layers, caches, writer, self._settings, sum_work)
        return self._programs[key]
