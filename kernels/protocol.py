"""The protocol of a variant: the operations that a decoder needs."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kernels.attention import AttentionPlan, LayerCache, PartPlan, PartSpan, SequenceSpan, SharedSpan
from kernels.linear import Linear


class Kernels(Protocol):
    """A variant of every operation. :mod:`kernels.reference` describes their shapes and meaning."""

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor: ...

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def gelu_mul(self, gate_up: Tensor) -> Tensor: ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...

    def write_kv(self, cache: LayerCache, slots: Tensor, keys: Tensor, values: Tensor) -> None: ...

    def plan(
        self, spans: Sequence[SequenceSpan], *, window: int | None = None, shared: Sequence[SharedSpan] = ()
    ) -> AttentionPlan: ...

    def attention(
        self, query: Tensor, keys: Tensor, values: Tensor, cache: LayerCache, plan: AttentionPlan, scale: float
    ) -> Tensor: ...

    def plan_parts(self, spans: Sequence[PartSpan], shared: Sequence[SharedSpan] = ()) -> PartPlan: ...

    def attend_parts(self, query: Tensor, cache: LayerCache, plan: PartPlan, scale: float) -> tuple[Tensor, Tensor]: ...
