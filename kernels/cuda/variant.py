"""The CUDA variant of every operation. Torch computes matrix products by cuBLAS."""

from collections.abc import Sequence

import torch

from kernels import reference
from kernels.attention import AttentionPlan, PartPlan, PartSpan, SequenceSpan, SharedSpan
from kernels.cuda import activations, attention, norms, parts, parts_plan, plan, rope
from kernels.cuda.shared import choose
from kernels.protocol import Kernels


class CudaKernels:
    """The operations on tensors of one device."""

    embedding = staticmethod(reference.embedding)
    pack = staticmethod(reference.pack)
    rms_norm = staticmethod(norms.rms_norm)
    add_rms_norm = staticmethod(norms.add_rms_norm)
    silu_mul = staticmethod(activations.silu_mul)
    gelu_mul = staticmethod(activations.gelu_mul)
    rotate = staticmethod(rope.rotate)
    write_kv = staticmethod(rope.write_kv)
    attention = staticmethod(attention.attention)
    attend_parts = staticmethod(parts.attend_parts)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def plan(
        self, spans: Sequence[SequenceSpan], *, window: int | None = None, shared: Sequence[SharedSpan] = ()
    ) -> AttentionPlan:
        """Implements :func:`kernels.reference.plan` on the device, and keeps those of ``shared`` that save time."""
        assert window is None or window > 0, window
        return plan.plan_step(spans, window, self._device, choose(spans, shared, window=window))

    def plan_parts(self, spans: Sequence[PartSpan], shared: Sequence[SharedSpan] = ()) -> PartPlan:
        """Implements :func:`kernels.reference.plan_parts` on the device; every query reads shared tokens by itself."""
        return parts_plan.plan_parts(spans, self._device)


def open_kernels(device: torch.device) -> Kernels:
    """Returns the variant for tensors of ``device``."""
    return CudaKernels(device)
