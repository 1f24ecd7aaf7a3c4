"""Names the tensors of a rounded weight, and puts it together from them again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.rounded import RoundedWeight
from placement.errors import InvalidModel

FIX_GPTQ = "Quantize the model again, or use its float32 or bfloat16 weights."


def rounded_parts(name: str, weight: RoundedWeight) -> dict[str, Tensor]:
    """Takes a rounded weight apart, by the names that :func:`take_rounded` looks for."""
    prefix = name.removesuffix("weight")
    parts = {"codes": weight.codes, "scales": weight.scales, "offsets": weight.offsets, "order": weight.order}
    return {f"{prefix}{part}": tensor for part, tensor in parts.items() if tensor is not None}


def take_rounded(weights: dict[str, Tensor], names: Sequence[str]) -> RoundedWeight | None:
    """Takes the rounded weights of linear layers with the same input out of ``weights``, and stacks them by rows.

    Args:
        weights: all tensors, by name.
        names: the linear layers, without ``.weight``.

    Returns:
        One weight with the rows of all; None where they are not rounded.

    Raises:
        InvalidModel: their columns are in different orders.
    """
    if f"{names[0]}.codes" not in weights:
        return None
    codes, scales = (torch.cat([weights.pop(f"{name}.{part}") for name in names]) for part in ("codes", "scales"))
    offsets, orders = ([weights.pop(f"{name}.{part}", None) for name in names] for part in ("offsets", "order"))
    first = orders[0]
    if not all(order is first or (order is not None and first is not None and order.equal(first)) for order in orders):
        problem = "have their columns in different orders (desc_act), and share their input"
        raise InvalidModel(field=", ".join(names), value=None, problem=problem, fix=FIX_GPTQ)
    return RoundedWeight(
        codes=codes,
        scales=scales,
        offsets=None if offsets[0] is None else torch.cat([part for part in offsets if part is not None]),
        order=first,
    )
