"""A decoder's layers as one program: all that happens between embedding and final norm, without Python in between.

For bfloat16 on CPUs that :mod:`kernels.matmul`, or :mod:`kernels.quantized`, has code for. Every operation is the same
as one by one, and so are the bits; but for norms of heads, which are plain torch there.

Shapes: T tokens of a batch, E hidden size, F feed-forward size, H query heads, K KV heads, D head dimension.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    layers: Sequence[DecoderLayer], *, head_dim: int, eps: float, scale: float, activation: str
) -> "FusedLayers | None":
    """The layers as one program, or None where a part of them has no compiled code.

    Args:
        layers: in order, at least one.
        head_dim: D.
        eps: of every norm.
        scale: of the attention's scores.
        activation: of the feed-forward layers, by its name in :class:`placement.specs.ModelSpec`.
    """
    if "avx512bf16" not in machine_code.cpu_features() or activation not in rows.ACTIVATIONS or head_dim % 32:
        return None
    fused = [layer for layer in map(_supported, layers) if layer is not None]
    if len(fused) < len(layers):
        return None
    return FusedLayers(fused, head_dim=head_dim, eps=eps, scale=scale, activation=activation)


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

    def __init__(self, layers: Sequence[Layer], *, head_dim: int, eps: float, scale: float, activation: str) -> None:
        """See :func:`fuse`."""
        self._layers = layers
        self._head_dim = head_dim
        self._eps = eps
        self._activation = activation
        self._scale = scale
        self._buffers = Buffers(layers, head_dim, 0)
        self._programs: OrderedDict[tuple[object, ...], _Compiled] = OrderedDict()

    def takes(self, attention: Mapping[Window, AttentionPlan]) -> bool:
        """Whether plans are of the variant whose attention it runs."""
        return all(plan.tasks is not None for plan in attention.values())

    def run(
        self,
        embedded: Tensor,
        caches: Sequence[LayerCache],
        slots: Tensor,
        turns: Mapping[Window, Turns],
        attention: Mapping[Window, AttentionPlan],
        reduce: Callable[[Tensor], None] | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """The last layer's output [T, E], of ``embedded`` [T, E]. Writes keys and values to ``slots`` of ``caches``.

        ``turns`` and ``attention`` have an entry for each window that some layer has. ``reduce`` is called with what
        each attention and feed-forward gives [T, E], to put the sum over all ranks in its place. ``attend``, with which
        there are no plans, attends instead of the program: to KV that other ranks have, too.
        """
        num_tokens = len(embedded)
        if not num_tokens:
            return embedded
        assert embedded.dtype == caches[0].keys.dtype == torch.bfloat16, (embedded.dtype, caches[0].keys.dtype)
        num_threads = torch.get_num_threads()
        compiled = self._compiled(num_tokens, num_threads, caches)
        buffers = self._buffers
        buffers.residual[:num_tokens] = embedded
        buffers.slots[:num_tokens] = slots
        for window, turn in turns.items():
            buffers.cos[window][:num_tokens] = turn.cos[:, 0]
            buffers.sin[window][:num_tokens] = turn.sin[:, 0]
        kept = self._plan_attention(compiled, num_threads, caches, attention)
        start = 0
        for stop, go_on, between in self._stops(compiled, num_tokens, caches, reduce, attend):
            compiled.program.run(num_threads, start, stop)
            between()
            start = go_on
        if start < len(compiled.program):
            compiled.program.run(num_threads, start)
        del kept  # until here its memory was in use
        return buffers.residual[:num_tokens] + buffers.update[:num_tokens]

    def _stops(
        self,
        compiled: _Compiled,
        num_tokens: int,
        caches: Sequence[LayerCache],
        reduce: Callable[[Tensor], None] | None,
        attend: Attend | None,
    ) -> list[tuple[int, int, Callable[[], None]]]:
        """Where the program stops, where it goes on, and what is done between."""
        stops: list[tuple[int, int, Callable[[], None]]] = []
        if reduce is not None:
            update = self._buffers.update[:num_tokens]
            stops += [(stop, stop, partial(reduce, update)) for stop in compiled.sums]
        if attend is not None:
            for at, layer, cache in zip(compiled.attention, self._layers, caches, strict=True):
                stops.append((at, at + 1, partial(self._attend, attend, layer.window, cache, num_tokens)))
        return sorted(stops, key=lambda stop: stop[0])

    def _attend(self, attend: Attend, window: Window, cache: LayerCache, num_tokens: int) -> None:
        query, attended = (
            x[:num_tokens].view(num_tokens, -1, self._head_dim) for x in (self._buffers.query, self._buffers.attended)
        )
        attended.copy_(attend(window, query, cache, self._scale))

    def _plan_attention(
        self,
        compiled: _Compiled,
        num_threads: int,
        caches: Sequence[LayerCache],
        attention: Mapping[Window, AttentionPlan],
    ) -> list[object]:
        """Puts the step's plans in their places; what must live as long as they are used."""
        buffers, num_heads = self._buffers, self._layers[0].output.num_inputs // self._head_dim
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

    def _compiled(self, num_tokens: int, num_threads: int, caches: Sequence[LayerCache]) -> _Compiled:
        if num_tokens > self._buffers.num_tokens:
            self._programs.clear()  # they hold addresses of the buffers
            del self._buffers  # first, or both would be there at once
            self._buffers = Buffers(self._layers, self._head_dim, -(-num_tokens // _ROWS_AT_ONCE) * _ROWS_AT_ONCE)
        places = ((x.keys.data_ptr(), x.values.data_ptr(), x.keys.shape[1]) for x in caches)
        key = (num_tokens, num_threads, *places)
        if key in self._programs:
            self._programs.move_to_end(key)
        else:
            if len(self._programs) == _MOST_PROGRAMS:
                self._programs.popitem(last=False)
            self._programs[key] = self._compile(num_tokens, num_threads, caches)
        return self._programs[key]

    def _compile(self, num_tokens: int, num_threads: int, caches: Sequence[LayerCache]) -> _Compiled:
        made = Program(_WORKS_PER_LAYER * len(self._layers))
        writer = Writer(made, self._buffers, num_tokens, num_threads, self._head_dim, self._eps)
        attention, sums = [], []
        for index, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            writer.norm(layer.attention_norm, adds=index > 0)
            writer.product(layer.qkv, self._buffers.normed, self._buffers.qkv)
            writer.turn(layer, cache)
            attention.append(made.add(*paged.no_attention(cache)))
            writer.product(layer.output, self._buffers.attended, self._buffers.update)
            sums.append(len(made))
            writer.norm_update(layer.attention_post_norm)
            writer.norm(layer.ffn_norm, adds=True)
            writer.product(layer.gate_up, self._buffers.normed, self._buffers.gate_up)
            writer.activate(self._activation)
            writer.product(layer.down, self._buffers.activated, self._buffers.update)
            sums.append(len(made))
            writer.norm_update(layer.ffn_post_norm)
        return _Compiled(program=made, attention=tuple(attention), sums=tuple(sums))
