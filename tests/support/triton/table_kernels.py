"""Operations in plain torch that read a step as CUDA's do, from the tables of ``kernels.cuda.plan``.

They run anywhere, and rows that no sequence owns come out as NaN, so that nothing can be made of them unseen.

Shapes: T tokens, H query heads, K KV heads, D head dimension, N tokens that a query sees.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import AttentionPlan, LayerCache, SequenceSpan, SharedSpan
from kernels.cuda.plan import DevicePlan, plan_step
from kernels.cuda.shared import choose


class TableKernels:
    """The reference's operations, but for those that look at the step."""

    embedding = staticmethod(reference.embedding)
    pack = staticmethod(reference.pack)
    rms_norm = staticmethod(reference.rms_norm)
    add_rms_norm = staticmethod(reference.add_rms_norm)
    silu_mul = staticmethod(reference.silu_mul)
    gelu_mul = staticmethod(reference.gelu_mul)
    rotate = staticmethod(reference.rotate)

    def plan(
        self, spans: Sequence[SequenceSpan], *, window: int | None = None, shared: Sequence[SharedSpan] = ()
    ) -> AttentionPlan:
        """As a GPU's plan, on the CPU."""
        return plan_step(spans, window, torch.device("cpu"), choose(spans, shared, window=window))

    def write_kv(self, cache: LayerCache, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """A token whose slot is -1 is not written."""
        owned = slots >= 0
        reference.write_kv(cache, slots[owned], keys[owned], values[owned])

    def attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float
    ) -> Tensor:
        """[T, H, D], by the rows of the tables that are in use."""
        assert isinstance(plan, DevicePlan)
        output = torch.full_like(query, torch.nan)
        num_decodes, num_merges, num_shared = plan.counts[:3].tolist()
        means = query.new_full((plan.num_partials, *query.shape[1:]), torch.nan)
        masses = query.new_full((plan.num_partials, query.shape[1]), torch.nan)
        for row, first_slot, begin, end, partial in plan.decodes[:num_decodes, :5].tolist():
            mean, mass = _attend(query[row], cache, plan.slots[first_slot + begin : first_slot + end], scale)
            if partial < 0:
                output[row] = mean
            else:
                means[partial], masses[partial] = mean, mass
        for first, count, first_slot, begin, end, number in plan.shared[:num_shared, :6].tolist():
            slots = plan.slots[first_slot + begin : first_slot + end]
            for row, offset in plan.members[first : first + count].tolist():
                means[offset + number], masses[offset + number] = _attend(query[row], cache, slots, scale)
        for row, first, count in plan.merges[:num_merges, :3].tolist():
            parts = slice(first, first + count)
            output[row] = (masses[parts].softmax(dim=0)[..., None] * means[parts]).sum(dim=0)
        for first_row, num_queries, first_slot, position in plan.chunks[:, :4].tolist():
            for index in range(num_queries):
                end = position + index + 1
                begin = 0 if plan.window is None else max(0, end - plan.window)
                slots = plan.slots[first_slot + begin : first_slot + end]
                output[first_row + index] = _attend(query[first_row + index], cache, slots, scale)[0]
        return output


def _attend(query: Tensor, cache: LayerCache, slots: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mean [H, D] of the values in ``slots`` [N] under ``query`` [H, D], and the logarithm of its mass [H]."""
    group = len(query) // len(cache.keys)
    keys, values = (part[:, slots].repeat_interleave(group, dim=0) for part in (cache.keys, cache.values))  # [H, N, D]
    scores = scale * torch.einsum("hd,hnd->hn", query, keys)
    return torch.einsum("hn,hnd->hd", scores.softmax(dim=-1), values), scores.logsumexp(dim=-1)
