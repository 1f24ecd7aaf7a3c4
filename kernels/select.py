"""The operations a decoder needs, as one protocol, and which variant of them a device runs."""

import importlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import AttentionPlan, LayerCache, PartPlan, PartSpan, SequenceSpan, SharedSpan
from kernels.cpu import variant as cpu
from kernels.cuda.gpus import runs_triton
from kernels.linear import Linear


class Kernels(Protocol):
    """One variant of every operation. Shapes and meaning are those of :mod:`kernels.reference`."""

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


def kernels_for(device: torch.device | str) -> Kernels:
    """The fastest variant for a torch device; devices with none of their own run the reference."""
    device = torch.device(device)
    if device.type == "cpu":
        return cpu
    if runs_triton(device):
        # By name, because the module imports Triton, which machines without a GPU need not have.
        variant: Kernels = importlib.import_module("kernels.cuda.variant").open_kernels(device)
        return variant
    return reference
