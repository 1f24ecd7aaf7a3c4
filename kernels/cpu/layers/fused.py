"""A decoder's layers as one program: all that happens between embedding and final norm, without Python in between.

For bfloat16 on CPUs that :mod:`kernels.cpu.products` has code for. Every operation is the same as one by one, and so
are the bits; but for norms of heads, which are plain torch there.

Shapes: T tokens of a batch, E hidden size, F feed-forward size, H query heads, K KV heads, D head dimension.
"""

from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.attention import Attend, AttentionPlan, LayerCache, Window
from kernels.cpu.attention import paged
from kernels.cpu.layers.fused_program import (
    Compiled,
    Finisher,
    Settings,
    compile_layers,
    max_works,
    updates,
    writer,
)
from kernels.cpu.layers.layer_works import Buffers, Layer, Turns
from kernels.cpu.layers.partial import Finish, Partial, SumWork
from kernels.cpu.layers.program import Program
from kernels.cpu.machine import machine_code
from kernels.cpu.products.linear import shared
from kernels.cpu.rows import rows
from kernels.linear import Linear

# Programs that are kept, one for each number of tokens: as many as decodes of a busy server have, and some chunks.
_MOST_PROGRAMS = 128
# Buffers grow by so many tokens, since every growth costs all programs.
_ROWS_AT_ONCE = 64


class DecoderLayer(Protocol):
    """Weights of one layer, as :mod:`workers.model.decoder` has them."""

    @property
    def window(self) -> Window: ...
    @property
    def attention_norm(self) -> Tensor: ...
    @property
    def qkv(self) -> Linear | None: ...
    @property
    def qk_norm(self) -> Tensor | None: ...
    @property
    def output(self) -> Linear | None: ...
    @property
    def attention_post_norm(self) -> Tensor | None: ...
    @property
    def ffn_norm(self) -> Tensor: ...
    @property
    def gate_up(self) -> Linear | None: ...
    @property
    def down(self) -> Linear | None: ...
    @property
    def ffn_post_norm(self) -> Tensor | None: ...


def fuse(
    layers: Sequence[DecoderLayer], *, head_dim: int, eps: float, scale: float, activation: str, ladder: bool = False
) -> "FusedLayers | None":
    """The layers as one program, or None where a part of them has no compiled code.

    Args:
        layers: in order, at least one.
        head_dim: D.
        eps: of every norm.
        scale: of the attention's scores.
        activation: of the feed-forward layers, by its name in :class:`placement.model.specs.ModelSpec`.
        ladder: see there.
    """
    if "avx512bf16" not in machine_code.cpu_features() or activation not in rows.ACTIVATIONS or head_dim % 32:
        return None
    fused = [layer for layer in map(_supported, layers) if layer is not None]
    if len(fused) < len(layers):
        return None
    assert len({(layer.qkv is None, layer.down is None) for layer in fused}) == 1, "a rank has heads in all its layers"
    settings = Settings(head_dim=head_dim, eps=eps, scale=scale, activation=activation, ladder=ladder)
    return FusedLayers(fused, settings)


def _supported(layer: DecoderLayer) -> Layer | None:
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    there = [linear for linear in linears if linear is not None]
    qkv, output, gate_up, down = (None if linear is None else shared(linear) for linear in linears)
    sharable = [linear for linear in (qkv, output, gate_up, down) if linear is not None]
    if not there or len(sharable) < len(there):
        return None
    assert (qkv is None) == (output is None) and (gate_up is None) == (down is None), layer
    qk_norm = None if layer.qk_norm is None else layer.qk_norm.contiguous()
    norms = (layer.attention_norm, qk_norm, layer.attention_post_norm, layer.ffn_norm, layer.ffn_post_norm)
    if not all(norm is None or rows.takes(norm) for norm in norms):
        return None
    if any(linear.num_inputs % 32 or linear.num_outputs % 16 for linear in sharable):
        return None
    return Layer(
        window=layer.window,
        attention_norm=layer.attention_norm,
        qkv=qkv,
        qk_norm=qk_norm,
        output=output,
        attention_post_norm=layer.attention_post_norm,
        ffn_norm=layer.ffn_norm,
        gate_up=gate_up,
        down=down,
        ffn_post_norm=layer.ffn_post_norm,
    )


class FusedLayers:
    """The layers of one decoder. For one thread at a time."""

    def __init__(self, layers: Sequence[Layer], settings: Settings) -> None:
        """See :func:`fuse`."""
        self._layers = layers
        self._settings = settings
        self._buffers = self._room(0)
        self._programs: OrderedDict[tuple[object, ...], Compiled] = OrderedDict()
        self._finisher = Finisher(layers, settings, _MOST_PROGRAMS)

    def takes(self, attention: Mapping[Window, AttentionPlan]) -> bool:
        """Whether plans are of the variant whose attention it runs."""
        return all(plan.tasks is not None for plan in attention.values())

    def reserve(self, num_tokens: int) -> None:
        """Memory for steps of so many tokens, or lanes of so many together: not while any is on its way."""
        if num_tokens > self._buffers.num_tokens:
            self._programs.clear()  # they hold addresses of the buffers
            self._finisher.clear()
            del self._buffers  # first, or both would be there at once
            self._buffers = self._room(-(-num_tokens // _ROWS_AT_ONCE) * _ROWS_AT_ONCE)

    def _room(self, num_tokens: int) -> Buffers:
        return Buffers(self._layers, self._settings.head_dim, num_tokens, ladder=self._settings.ladder)

    def run(
        self,
        embedded: Tensor,
        caches: Sequence[LayerCache],
        slots: Tensor,
        turns: Mapping[Window, Turns],
        attention: Mapping[Window, AttentionPlan],
        *,
        sums: bool = False,
        sum_work: SumWork | None = None,
        attend: Attend | None = None,
        first_row: int = 0,
        num_layers: int | None = None,
    ) -> Generator[Partial, None, Tensor]:
        """The last layer's output [T, E], of ``embedded`` [T, E]. Writes keys and values to ``slots`` of ``caches``.

        ``turns`` and ``attention`` have an entry for each window that some layer has.

        Args:
            sums: what each attention and feed-forward gives is a part of a sum: it is given, and this goes on once
                the sum is in its place, or finished; of a ladder, once the sum before it is.
            sum_work: sums it within the program, so that nothing is given. Not of a ladder.
            attend: attends instead of the program, to KV that other ranks have, too; then there are no plans.
            first_row: of the buffers, where another lane has those before it; it and the spare rows of the products
                are reserved.
            num_layers: only the first ones are computed, for a measurement: what is returned is of no use.
        """
        num_tokens = len(embedded)
        if not num_tokens:
            return embedded
        assert embedded.dtype == caches[0].keys.dtype == torch.bfloat16, (embedded.dtype, caches[0].keys.dtype)
        assert attend is not None or len(attention) == len(turns), "attention without a plan"
        num_threads = torch.get_num_threads()
        self.reserve(first_row + num_tokens)
        buffers = self._buffers.from_row(first_row)
        assert sum_work is None or (sums and attend is None), "a program that sums does not stop"
        compiled = self._compiled(buffers, first_row, num_tokens, num_threads, caches, sum_work)
        buffers.fill(embedded, slots, turns)
        kept = self._plan_attention(compiled, buffers, num_threads, caches, attention)
        start = 0
        num_sums = 0
        partial: Partial | None = None
        gives, end = sums and sum_work is None, compiled.end(num_layers)
        for stop, attends_in in self._stops(compiled, end, sums=gives, attends=attend is not None):
            compiled.program.run(num_threads, start, stop)
            if attends_in is None:
                partial = self._partial(buffers, first_row, num_tokens, num_sums)
                yield partial
                start = compiled.finished[num_sums] if partial.is_finished else stop
                num_sums += 1
            else:
                assert attend is not None
                self._attend(attend, attends_in, buffers, caches, num_tokens)
                start = stop + 1
        if sum_work is not None:
            self._run_summing(compiled.program, num_threads, end, sum_work)
        elif start < end:
            compiled.program.run(num_threads, start, end)
        del kept  # until here its memory was in use
        if partial is not None and partial.is_finished:
            assert partial.finish is not None
            return partial.finish.result
        if self._settings.ladder and sums:
            yield Partial(update=embedded[:0])  # until the last sum is there
        return buffers.total(num_tokens, ladder=self._settings.ladder)

    def _run_summing(self, program: Program, num_threads: int, end: int, sum_work: SumWork) -> None:
        """A program that sums by itself. Raises what kept a sum from being there."""
        sum_work.begin()
        program.run(num_threads, stop=end, ended_by=sum_work.failed)
        sum_work.end()

    def _partial(self, buffers: Buffers, first_row: int, num_tokens: int, number: int) -> Partial:
        """Of an attention or a feed-forward. What is done with the last sum is to add it to the residual."""
        update = updates(buffers, ladder=self._settings.ladder)[number % 2][:num_tokens]
        if self._settings.ladder:
            return Partial(update=update)
        is_last = number + 1 == 2 * len(self._layers)
        result = torch.empty_like(update) if is_last else buffers.normed[:num_tokens]

        def rows(start: int, stop: int) -> None:
            self._finisher.run(self._buffers, number, first_row + start, stop - start)
            if is_last:
                torch.add(buffers.residual[start:stop], update[start:stop], out=result[start:stop])

        return Partial(update=update, finish=Finish(result=result, rows=rows))

    def _stops(self, compiled: Compiled, end: int, *, sums: bool, attends: bool) -> list[tuple[int, int | None]]:
        """Where the program stops up to its end, and in which layer, where that is for attention; else for a sum."""
        stops: list[tuple[int, int | None]] = [(stop, None) for stop in compiled.sums] if sums else []
        if attends:
            stops += [(stop, layer) for layer, stop in enumerate(compiled.attention)]
        return sorted((stop for stop in stops if stop[0] <= end), key=lambda stop: stop[0])

    def _attend(
        self, attend: Attend, layer: int, buffers: Buffers, caches: Sequence[LayerCache], num_tokens: int
    ) -> None:
        query, attended = (
            x[:num_tokens].view(num_tokens, -1, self._settings.head_dim) for x in (buffers.query, buffers.attended)
        )
        attended.copy_(attend(self._layers[layer].window, query, caches[layer], self._settings.scale))

    def _plan_attention(
        self,
        compiled: Compiled,
        buffers: Buffers,
        num_threads: int,
        caches: Sequence[LayerCache],
        attention: Mapping[Window, AttentionPlan],
    ) -> list[object]:
        """Puts the step's plans in their places; what must live as long as they are used."""
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
                job = paged.attention(
                    caches[i], plan.tasks, self._settings.scale, memory, *addresses, ticket.data_ptr()
                )[1]
                compiled.program.change(compiled.attention[i], job)
        return kept

    def _compiled(
        self,
        buffers: Buffers,
        first_row: int,
        num_tokens: int,
        num_threads: int,
        caches: Sequence[LayerCache],
        sum_work: SumWork | None,
    ) -> Compiled:
        places = ((x.keys.data_ptr(), x.values.data_ptr(), x.keys.shape[1]) for x in caches)
        num_strips = 1 if sum_work is None else sum_work.num_strips(buffers.update[:num_tokens])
        summed_by = 0 if sum_work is None else sum_work.failed  # which nobody else has while the program is kept
        key = (first_row, num_tokens, num_threads, summed_by, num_strips, *places)
        if key in self._programs:
            self._programs.move_to_end(key)
        else:
            if len(self._programs) == _MOST_PROGRAMS:
                self._programs.popitem(last=False)
            made = Program(max_works(self._layers, num_strips))
            writes = writer(made, buffers, num_tokens, num_threads, self._settings)
            self._programs[key] = compile_layers(self._layers, caches, writes, self._settings, sum_work)
        return self._programs[key]
