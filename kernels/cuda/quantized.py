"""Linear layers with rounded weights on CUDA: the code on the host.

A small batch is multiplied directly by the codes, which are read once. For a large batch the weight is widened part by
part to the number type of the inputs, and cuBLAS multiplies by it.

Shapes: T tokens of a batch, I inputs, O outputs.
"""

import torch
import triton
from torch import Tensor

from kernels.cuda.gpus import num_multiprocessors
from kernels.cuda.quantized_kernels import product_kernel, widen_kernel
from kernels.cuda.quantized_tiles import MOST_TOKENS, TILE_OUTPUTS, TiledWeight, cut, tile_for, tiled
from kernels.rounded import RoundedWeight

_WIDENED_AT_ONCE = 1 << 24  # how many numbers are widened at once: enough to keep a GPU busy
_LEAST_TOKENS = 16  # the fewest tokens of a tile
_WIDENED_OUTPUTS = 32  # the outputs that one program widens


class TiledLinear:
    """A linear layer whose rounded weight :func:`kernels.cuda.quantized_tiles.can_tile`."""

    def __init__(self, weight: RoundedWeight, bias: Tensor | None) -> None:
        """Copies the codes of ``weight`` [O, I] and does not hold on to them; keeps ``bias`` [O]."""
        self._weight = tiled(weight)
        self._bias = bias
        # A counter for each tile's parts. All are 0 between two products, which a stream runs one after the other.
        most_tiles = self._weight.codes.shape[1] // TILE_OUTPUTS * (MOST_TOKENS // _LEAST_TOKENS)
        self._tickets = torch.zeros(most_tiles, dtype=torch.int32, device=weight.codes.device)

    @property
    def num_outputs(self) -> int:
        return self._weight.num_outputs

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes + self._tickets.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """Implements :class:`kernels.linear.Linear`. Up to MOST_TOKENS tokens no weight is rounded again."""
        weight = self._weight
        assert x.shape[1] == weight.num_inputs, (x.shape, weight.num_inputs)
        x = x if weight.order is None else x.index_select(1, weight.order)
        if not len(x):
            return x.new_empty(0, weight.num_outputs)
        with torch.cuda.device_of(x):
            if len(x) <= MOST_TOKENS:
                return multiply(x, weight, self._bias, self._tickets)
            return _multiply_widened(x, weight, self._bias)


def multiply(x: Tensor, weight: TiledWeight, bias: Tensor | None, tickets: Tensor) -> Tensor:
    """Computes ``x W^T + b`` [T, O] of ``x`` [T, I], whose columns are in the order of the codes.

    It sums in float32 and rounds once. How sums are cut into parts depends on T only by the number of tiles.

    Args:
        tickets: int32 zeros, one for each tile of the result; they are zero again afterwards.
    """
    assert x.stride(1) == 1, x.stride()
    num_tokens, num_blocks, padded = len(x), *weight.codes.shape[:2]
    tile = tile_for(num_tokens, block=weight.block, bits=weight.bits, itemsize=x.itemsize)
    num_tiles, token_tiles = padded // TILE_OUTPUTS, triton.cdiv(num_tokens, tile.tokens)
    blocks_per_part = cut(num_tiles * token_tiles, num_blocks, num_multiprocessors(x.device))
    parts = triton.cdiv(num_blocks, blocks_per_part)
    output = x.new_empty(num_tokens, weight.num_outputs)
    partials = x.new_empty((parts, num_tokens, padded) if parts > 1 else (0,), dtype=torch.float32)
    product_kernel[(token_tiles, num_tiles, parts)](
        *(x, weight.codes, weight.scales, weight.offsets, bias, output, partials, tickets),
        *(x.stride(0), num_tokens, weight.num_outputs, padded, num_blocks, blocks_per_part),
        *(weight.bits, weight.block, weight.blocks_per_group, TILE_OUTPUTS, tile.tokens),
        *(weight.offsets is not None, bias is not None, parts > 1, tile.num_stages, _is_interpreted(x)),
        num_warps=tile.num_warps,
    )
    return output


def widened(weight: TiledWeight, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """Widens the outputs ``first`` to ``first + count`` of the weight; columns stay in the order of the codes.

    Both must be multiples of TILE_OUTPUTS, so padding may be among the rows [count, I].
    """
    assert first % TILE_OUTPUTS == 0 and count % TILE_OUTPUTS == 0, (first, count)
    weights = torch.empty(count, weight.num_inputs, dtype=dtype, device=weight.codes.device)
    num_blocks, padded = weight.codes.shape[:2]
    widen_kernel[(count // _WIDENED_OUTPUTS, num_blocks)](
        *(weight.codes, weight.scales, weight.offsets, weights, padded, first, weight.num_inputs),
        *(weight.bits, weight.block, weight.blocks_per_group, _WIDENED_OUTPUTS, weight.offsets is not None),
    )
    return weights


def _multiply_widened(x: Tensor, weight: TiledWeight, bias: Tensor | None) -> Tensor:
    """Does the same as :func:`multiply` for many tokens; weights are rounded to the number type of ``x``."""
    output = x.new_empty(len(x), weight.num_outputs)
    step = max(1, _WIDENED_AT_ONCE // weight.num_inputs // TILE_OUTPUTS) * TILE_OUTPUTS
    padded = weight.codes.shape[1]
    for first in range(0, padded, step):
        stop = min(first + step, weight.num_outputs)
        part = widened(weight, first, min(step, padded - first), x.dtype)[: stop - first].T
        if bias is None:
            torch.mm(x, part, out=output[:, first:stop])
        else:
            torch.addmm(bias[first:stop].to(x.dtype), x, part, out=output[:, first:stop])
    return output


def _is_interpreted(x: Tensor) -> bool:
    """Tells whether Triton's interpreter runs: it multiplies the bits of bfloat16, and has no GPU instructions."""
    return x.device.type != "cuda"
