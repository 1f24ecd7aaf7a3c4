"""A decoder's layers as one program: all that happens between embedding and final norm, without Python in between.

For bfloat16 on CPUs that :mod:`kernels.matmul`, or :mod:`kernels.quantized`, has code for. Every operation is the same
as one by one, and so are the bits; but for norms of heads, which are plain torch there.

Shapes: T tokens of a batch, E hidden size, F feed-forward size, H query heads, K KV heads, D head dimension.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import machine_code, paged, rows
from kernels.attention import AttentionPlan, LayerCache
from kernels.layer_works import Buffers, Layer, Window, Writer
from kernels.linear import Linear, shared
from kernels.program import Program

# Programs that are kept, one for each number of tokens: as many as decodes of a busy server have, and some chunks.
_MOST_PROGRAMS = 128
_WORKS_PER_LAYER = 15
# Buffers grow by so many tokens, since every growth costs all programs.
_ROWS_AT_ONCE = 64


class DecoderLayer(Protocol):
    """Weights of one layer, as :mod:`workers.decoder` has them."""

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


# Attention [T, H, D] of queries [T, H, D] in a layer with that window and cache; its scores have that factor.
Attend = Callable[[Window, Tensor, LayerCache, float], Tensor]


class Turns(Protocol):
    """Cosine and signed sine of every token's angles, each [T, 1, D]."""

    @property
    def cos(self) -> Tensor: ...
    @property
    def sin(self) -> Tensor: ...


def fuse(
    layers: Sequence[DecoderLayer], *, head_dim: int, eps: float, scale: float, activation: str, ladder: bool = False
) -> "FusedLayers | None":
    """The layers as one program, or None where a part of them has no compiled code.

    Args:
        layers: in order, at least one.
        head_dim: D.
        eps: of every norm.
        scale: of the attention's scores.
        activation: of the feed-forward layers, by its name in :class:`placement.specs.ModelSpec`.
        ladder: see there.
    """
    if "avx512bf16" not in machine_code.cpu_features() or activation not in rows.ACTIVATIONS or head_dim % 32:
        return None
    fused = [layer for layer in map(_supported, layers) if layer is not None]
    if len(fused) < len(layers):
        return None
    return FusedLayers(fused, head_dim=head_dim, eps=eps, scale=scale, activation=activation, ladder=ladder)


def _supported(layer: DecoderLayer) -> Layer | None:
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    qkv, output, gate_up, down = (None if linear is None else shared(linear) for linear in linears)
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    qk_norm = None if layer.qk_norm is None else layer.qk_norm.contiguous()
    norms = (layer.attention_norm, qk_norm, layer.attention_post_norm, layer.ffn_norm, layer.ffn_post_norm)
    if not all(norm is None or rows.takes(norm) for norm in norms):
        return None
    if any(linear.num_inputs % 32 or linear.num_outputs % 16 for linear in (qkv, output, gate_up, down)):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compiled:
    """The program for a number of tokens.

    Attributes:
        attention: the number of each layer's attention in it.
        sums: where the update is a part of a sum, which other ranks have the rest of: two numbers a layer.
    """

    program: Program
    attention: tuple[int, ...]
    sums: tuple[int, ...]


class FusedLayers:
    """The layers of one decoder. For one thread at a time."""

    def __init__(
        self, layers: Sequence[Layer], *, head_dim: int, eps: float, scale: float, activation: str, ladder: bool
    ) -> None:
        """See :func:`fuse`."""
        self._ladder = ladder
        self._layers = layers
        self._head_dim = head_dim
        self._eps = eps
        self._activation = activation
        self._scale = scale
        self._buffers = self._room(0)
        self._programs: OrderedDict[tuple[object, ...], _Compiled] = OrderedDict()

    def takes(self, attention: Mapping[Window, AttentionPlan]) -> bool:
        """Whether plans are of the variant whose attention it runs."""
        return all(plan.tasks is not None for plan in attention.values())

    def reserve(self, num_tokens: int) -> None:
        """Memory for steps of so many tokens, or lanes of so many together: not while any is on its way."""
        if num_tokens > self._buffers.num_tokens:
            self._programs.clear()  # they hold addresses of the buffers
            del self._buffers  # first, or both would be there at once
            self._buffers = self._room(-(-num_tokens // _ROWS_AT_ONCE) * _ROWS_AT_ONCE)

    def _room(self, num_tokens: int) -> Buffers:
        return Buffers(self._layers, self._head_dim, num_tokens, ladder=self._ladder)

    def run(
        self,
        embedded: Tensor,
        caches: Sequence[LayerCache],
        slots: Tensor,
        turns: Mapping[Window, Turns],
        attention: Mapping[Window, AttentionPlan],
        *,
        sums: bool = False,
        attend: Attend | None = None,
        first_row: int = 0,
    ) -> Generator[Tensor, None, Tensor]:
        """The last layer's output [T, E], of ``embedded`` [T, E]. Writes keys and values to ``slots`` of ``caches``.

        ``turns`` and ``attention`` have an entry for each window that some layer has.

        Args:
            sums: what each attention and feed-forward gives [T, E] is a part of a sum: it is given, and this goes on
                once the sum is in its place; of a ladder, once the sum before it is.
            attend: attends instead of the program, to KV that other ranks have, too; then there are no plans.
            first_row: of the buffers, where another lane has those before it; it and the spare rows of the products
                are reserved.
        """
        num_tokens = len(embedded)
        if not num_tokens:
            return embedded
        assert embedded.dtype == caches[0].keys.dtype == torch.bfloat16, (embedded.dtype, caches[0].keys.dtype)
        num_threads = torch.get_num_threads()
        self.reserve(first_row + num_tokens)
        buffers = self._buffers.from_row(first_row)
        compiled = self._compiled(buffers, first_row, num_tokens, num_threads, caches)
        buffers.residual[:num_tokens] = embedded
        buffers.slots[:num_tokens] = slots
        for window, turn in turns.items():
            buffers.cos[window][:num_tokens] = turn.cos[:, 0]
            buffers.sin[window][:num_tokens] = turn.sin[:, 0]
        kept = self._plan_attention(compiled, buffers, num_threads, caches, attention)
        start = 0
        num_sums = 0
        for stop, attends_in in self._stops(compiled, sums=sums, attends=attend is not None):
            compiled.program.run(num_threads, start, stop)
            if attends_in is None:
                yield self._update(buffers, num_sums)[:num_tokens]
                start, num_sums = stop, num_sums + 1
            else:
                assert attend is not None
                self._attend(attend, attends_in, buffers, caches, num_tokens)
                start = stop + 1
        if start < len(compiled.program):
            compiled.program.run(num_threads, start)
        del kept  # until here its memory was in use
        if not self._ladder:
            return buffers.residual[:num_tokens] + buffers.update[:num_tokens]
        if sums:
            yield embedded[:0]  # until the last sum is there
        return buffers.residual[:num_tokens] + buffers.update[:num_tokens] + buffers.later[:num_tokens]

    def _update(self, buffers: Buffers, number: int) -> Tensor:
        """Where an attention's or a feed-forward's update goes: on a ladder the one before is still to be added."""
        return buffers.later if self._ladder and number % 2 else buffers.update

    def _stops(self, compiled: _Compiled, *, sums: bool, attends: bool) -> list[tuple[int, int | None]]:
        """Where the program stops, and in which layer, where that is for its attention; else for a sum."""
        stops: list[tuple[int, int | None]] = [(stop, None) for stop in compiled.sums] if sums else []
        if attends:
            stops += [(stop, layer) for layer, stop in enumerate(compiled.attention)]
        return sorted(stops, key=lambda stop: stop[0])

    def _attend(
        self, attend: Attend, layer: int, buffers: Buffers, caches: Sequence[LayerCache], num_tokens: int
    ) -> None:
        query, attended = (
            x[:num_tokens].view(num_tokens, -1, self._head_dim) for x in (buffers.query, buffers.attended)
        )
        attended.copy_(attend(self._layers[layer].window, query, caches[layer], self._scale))

    def _plan_attention(
        self,
        compiled: _Compiled,
        buffers: Buffers,
        num_threads: int,
        caches: Sequence[LayerCache],
        attention: Mapping[Window, AttentionPlan],
    ) -> list[object]:
        """Puts the step's plans in their places; what must live as long as they are used."""
        num_heads = self._layers[0].output.num_inputs // self._head_dim
        kept: list[object] = []
        for window, plan in attention.items():
            assert plan.tasks is not None, plan
            members = [i for i, layer in enumerate(self._layers) if layer.window == window]
            memory = paged.Workspace(caches[members[0]], num_heads, plan.tasks, num_threads)
            num_tickets = paged.num_tickets(plan.tasks, caches[members[0]].keys.shape[0])
            tickets = torch.zeros(len(members), num_tickets, dtype=torch.int64)
            kept += [memory, tickets]
            addresses = (buffers.query.data_ptr(), buffers.attended.data_ptr())
            for i, ticket in zip(members, tickets, strict=True):
                job = paged.attention(caches[i], plan.tasks, self._scale, memory, *addresses, ticket.data_ptr())[1]
                compiled.program.change(compiled.attention[i], job)
        return kept

    def _compiled(
        self, buffers: Buffers, first_row: int, num_tokens: int, num_threads: int, caches: Sequence[LayerCache]
    ) -> _Compiled:
        places = ((x.keys.data_ptr(), x.values.data_ptr(), x.keys.shape[1]) for x in caches)
        key = (first_row, num_tokens, num_threads, *places)
        if key in self._programs:
            self._programs.move_to_end(key)
        else:
            if len(self._programs) == _MOST_PROGRAMS:
                self._programs.popitem(last=False)
            self._programs[key] = self._compile(buffers, num_tokens, num_threads, caches)
        return self._programs[key]

    def _compile(self, buffers: Buffers, num_tokens: int, num_threads: int, caches: Sequence[LayerCache]) -> _Compiled:
        made = Program(_WORKS_PER_LAYER * len(self._layers))
        writer = Writer(made, buffers, num_tokens, num_threads, self._head_dim, self._eps)
        attention, sums = [], []
        attended, fed = self._update(buffers, 0), self._update(buffers, 1)
        for index, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            writer.norm(layer.attention_norm, attended if self._ladder else fed, adds=index > 0)
            writer.product(layer.qkv, buffers.normed, buffers.qkv)
            writer.turn(layer, cache)
            attention.append(made.add(*paged.no_attention(cache)))
            writer.product(layer.output, buffers.attended, attended)
            sums.append(len(made))
            writer.norm_update(layer.attention_post_norm)
            writer.norm(layer.ffn_norm, fed if self._ladder else attended, adds=index > 0 or not self._ladder)
            writer.product(layer.gate_up, buffers.normed, buffers.gate_up)
            writer.activate(self._activation)
            writer.product(layer.down, buffers.activated, fed)
            sums.append(len(made))
            writer.norm_update(layer.ffn_post_norm)
        return _Compiled(program=made, attention=tuple(attention), sums=tuple(sums))
