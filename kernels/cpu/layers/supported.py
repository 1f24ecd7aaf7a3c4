"""Which decoder layers a compiled program can run."""

from typing import Protocol

from torch import Tensor

from kernels.attention import Window
from kernels.cpu.layers.layer_works import Layer
from kernels.cpu.products.linear import program_linear
from kernels.cpu.rows import rows
from kernels.linear import Linear


class DecoderLayer(Protocol):
    """The weights of one layer, as :mod:`workers.model.decoder` has them."""

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


def supported_layer(layer: DecoderLayer) -> Layer | None:
    """Returns the layer as one that a program can run, or None where no program can."""
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    present = [linear for linear in linears if linear is not None]
    qkv, output, gate_up, down = (None if linear is None else program_linear(linear) for linear in linears)
    supported = [linear for linear in (qkv, output, gate_up, down) if linear is not None]
    if not present or len(supported) < len(present):
        return None
    assert (qkv is None) == (output is None) and (gate_up is None) == (down is None), layer
    qk_norm = None if layer.qk_norm is None else layer.qk_norm.contiguous()
    norms = (layer.attention_norm, qk_norm, layer.attention_post_norm, layer.ffn_norm, layer.ffn_post_norm)
    if not all(norm is None or rows.is_norm_supported(norm) for norm in norms):
        return None
    if any(linear.num_inputs % 32 or linear.num_outputs % 16 for linear in supported):
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
