"""Describes linear layers whose weights are held in 8 or 4 bits. Owns the choice of groups and the layout of GPTQ.

The input columns of a group share a scale. Weights are rounded while a model loads, or they were rounded when the
checkpoint was made by GPTQ (Frantar et al. 2023). Embedding and norms stay as they are.

Shapes: I input columns and O output rows of a linear layer, G groups of columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from placement.errors import InvalidConfig, InvalidModel
from placement.model.hf_values import Config, flag, refusal, section
from placement.model.part import Span
from placement.model.specs import DType
from placement.model.weights import EMBEDDING, FINAL_NORM, HEAD, TensorSlice

Bits = Literal[4, 8]

GROUP_SIZES = (128, 64, 32)
"""The sizes of groups. The first that divides a layer's columns is used, since larger groups take less memory."""

_LAYER_SUFFIX = "_proj.weight"
_FACTOR_BYTES = 4  # of a scale or an offset
_INDEX_BYTES = 8  # of a column's place, where columns are reordered
_KEY = "quantization_config"
_ZERO_SHIFTS = {"gptq": 1, "gptq_v2": 0}  # by checkpoint_format
_WORD_BITS = 32
_FIX_GPTQ = "Use a GPTQ checkpoint of 4 or 8 bits, or the model's float32 or bfloat16 weights."
_FLOATS, _INTEGERS = ("F32", "F16", "BF16"), ("I32",)


class Quantization(Enum):
    """The number type to which the weights of linear layers are rounded while they load."""

    NONE = "none"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqLayout:
    """The settings in which GPTQ checkpoints of equal bits differ.

    Attributes:
        group_size: columns of a group; None: all columns of a layer are one group.
        zero_shift: the number to add to the stored zero points.
        ordered: whether columns were grouped by the size of their activations (``desc_act``).
    """

    group_size: int | None
    zero_shift: int
    ordered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFormat:
    """The format in which linear layers hold their weights.

    Attributes:
        bits: bits of a weight in the decoder's layers.
        head_bits: bits of a weight in the output head; None: the head stays in the model's number type.
        offsets: whether a group has an offset beside its scale.
        gptq: the layout of a GPTQ checkpoint; None: weights are rounded while they load.
    """

    bits: Bits
    head_bits: Bits | None = None
    offsets: bool = False
    gptq: GptqLayout | None = None

    def group_size(self, num_columns: int) -> int | None:
        """Returns the columns of a group in a layer; None where its columns do not make whole groups."""
        sizes = GROUP_SIZES if self.gptq is None else (self.gptq.group_size or num_columns,)
        return next((size for size in sizes if num_columns % size == 0), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqTensors:
    """The tensors that a GPTQ checkpoint has in place of a weight [O, I].

    A 32-bit word holds ``32 / bits`` codes, the first in its lowest bits.

    Attributes:
        codes: ``qweight``, with words along the columns, [I * bits / 32, O].
        zeros: ``qzeros``, with words along the rows, [G, O * bits / 32].
        scales: ``scales``, [G, O].
        groups: ``g_idx``, the group of each column, [I].
    """

    codes: TensorSlice
    zeros: TensorSlice
    scales: TensorSlice
    groups: TensorSlice

    @property
    def all(self) -> tuple[TensorSlice, ...]:
        """Lists the four tensors."""
        return self.codes, self.zeros, self.scales, self.groups


def linear_format(config: Config, quantization: Quantization) -> LinearFormat | None:
    """Returns the format of a model when ``quantization`` is asked for; None: linear layers stay in its number type.

    Raises:
        InvalidModel: the checkpoint is quantized in a way that is not served.
        InvalidConfig: ``quantization`` would round weights that were rounded before.
    """
    gptq = read_gptq(config)
    if gptq is not None and quantization is not Quantization.NONE:
        raise InvalidConfig(
            field="model.quantization",
            value=quantization.value,
            problem=f"asks to round weights that this checkpoint holds in {gptq.bits} bits already (GPTQ)",
            fix="Set it to none, or use the model's float32 or bfloat16 weights.",
        )
    match quantization:
        case Quantization.NONE:
            return gptq
        case Quantization.INT8:
            return LinearFormat(bits=8, head_bits=8)
        case Quantization.INT4:
            return LinearFormat(bits=4, head_bits=8)


def read_gptq(config: Config) -> LinearFormat | None:
    """Reads the ``quantization_config`` of a GPTQ checkpoint; None where the file has none.

    Raises:
        InvalidModel: it names another method, or a variant that is not served.
    """
    values = section(config, _KEY)
    if not values:
        return None
    _accept(values, "quant_method", "gptq")
    _accept(values, "pack_dtype", "int32", None)
    bits = _accept(values, "bits", 4, 8)
    layout = _accept(values, "checkpoint_format", *_ZERO_SHIFTS, None) or "gptq"
    for name in ("lm_head", "dynamic"):
        if values.get(name):
            raise refusal(f"{_KEY}.{name}", values[name], "is not served", _FIX_GPTQ)
    group_size = values.get("group_size")
    if group_size != -1 and (not isinstance(group_size, int) or group_size < 8 or group_size % 8):
        raise refusal(f"{_KEY}.group_size", group_size, "is neither -1 nor a multiple of 8", _FIX_GPTQ)
    return LinearFormat(
        bits=4 if bits == 4 else 8,
        # 8 bits have codes from -128: see kernels.cpu.products.quantized_ir for why those take an offset.
        offsets=bits == 8 or not flag(values, "sym", default=True, where=_KEY),
        gptq=GptqLayout(
            group_size=None if group_size == -1 else group_size,
            zero_shift=_ZERO_SHIFTS[str(layout)],
            ordered=flag(values, "desc_act", where=_KEY),
        ),
    )


def _accept(values: Config, name: str, *accepted: object) -> object:
    value = values.get(name)
    if value not in accepted or isinstance(value, bool):
        raise refusal(f"{_KEY}.{name}", value, "is not served", _FIX_GPTQ)
    return value


def is_layer_weight(slice_: TensorSlice) -> bool:
    """Tells whether a slice is the weight of a linear layer of the decoder; the output head is none."""
    return slice_.name.endswith(_LAYER_SUFFIX)


def head_weight(slices: Sequence[TensorSlice]) -> TensorSlice | None:
    """Finds the weight of the output head among a rank's slices: the embedding where the two are tied."""
    by_name = {slice_.name: slice_ for slice_ in slices}
    return by_name.get(HEAD, by_name.get(EMBEDDING)) if FINAL_NORM in by_name else None


def check_linear_format(slices: Sequence[TensorSlice], linear: LinearFormat | None) -> None:
    """Checks that a rank's slices can be held in this format.

    Raises:
        InvalidConfig: ``model.quantization`` cannot divide a layer's columns into groups.
        InvalidModel: the GPTQ checkpoint cannot have these sizes, or a cut goes through a group or a word.
    """
    if linear is None:
        return
    layers = [slice_ for slice_ in slices if is_layer_weight(slice_)]
    if linear.gptq is not None:
        for slice_ in layers:
            gptq_tensors(slice_, linear)
        return
    head = head_weight(slices)
    for slice_ in [*layers, *([] if head is None else [head])]:
        width, columns = slice_.shape[1], slice_.spans[1]
        group_size = linear.group_size(width)
        if group_size is None:
            raise InvalidConfig(
                field="model.quantization",
                value=f"int{linear.bits}",
                problem=f"needs columns in groups of {GROUP_SIZES[-1]}, and {slice_.name} has {width}",
                fix="Set it to none for this model.",
            )
        if columns.start % group_size or columns.stop % group_size:
            problem = f"does not begin and end at a multiple of {group_size}, the columns of a group"
            raise _bad_cut(slice_, "columns", columns, problem)


def loaded_bytes(slices: Sequence[TensorSlice], dtype: DType, linear: LinearFormat | None) -> int:
    """Counts the bytes of the slices once loaded: linear layers in the format ``linear``, all else as ``dtype``.

    A tied head that is rounded counts beside the embedding.
    """
    total = sum(_slice_bytes(slice_, dtype, linear) for slice_ in slices)
    head = head_weight(slices)
    if linear is not None and linear.head_bits is not None and head is not None and head.name == EMBEDDING:
        total += _rounded_bytes(head, linear.head_bits, linear)
    return total


def _slice_bytes(slice_: TensorSlice, dtype: DType, linear: LinearFormat | None) -> int:
    """Counts the bytes of one slice once loaded."""
    if linear is not None and is_layer_weight(slice_):
        return _rounded_bytes(slice_, linear.bits, linear)
    if linear is not None and linear.head_bits is not None and slice_.name == HEAD:
        return _rounded_bytes(slice_, linear.head_bits, linear)
    return slice_.num_elements * dtype.itemsize


def _rounded_bytes(slice_: TensorSlice, bits: Bits, linear: LinearFormat) -> int:
    """Counts the bytes of a weight's codes, scales and offsets, and of the order of its columns."""
    width = slice_.shape[1]
    num_groups = slice_.num_elements // (linear.group_size(width) or width)
    order = len(slice_.spans[1]) * _INDEX_BYTES if linear.gptq is not None and linear.gptq.ordered else 0
    return slice_.num_elements * bits // 8 + num_groups * _FACTOR_BYTES * (1 + linear.offsets) + order


def gptq_tensors(slice_: TensorSlice, linear: LinearFormat) -> GptqTensors:
    """Finds the tensors of a GPTQ checkpoint that hold a slice of a linear layer's weight.

    Raises:
        InvalidModel: the layer has no whole groups or words, or the slice cuts through one; the dim is named.
    """
    assert linear.gptq is not None, linear
    (num_rows, num_columns), (rows, columns) = slice_.shape, slice_.spans
    codes_a_word = _WORD_BITS // linear.bits
    group_size = linear.group_size(num_columns)
    if group_size is None or num_columns % codes_a_word or num_rows % codes_a_word:
        problem = f"does not fit {slice_.name}, which has {num_rows} rows and {num_columns} columns"
        raise refusal(f"{_KEY}.group_size", linear.gptq.group_size, problem)
    unit = max(group_size, codes_a_word)
    if linear.gptq.ordered and len(columns) != num_columns:
        raise _bad_cut(slice_, "columns", columns, "is a part, and with desc_act their groups are not neighbours")
    for dim, span, of in (("rows", rows, codes_a_word), ("columns", columns, unit)):
        if span.start % of or span.stop % of:
            raise _bad_cut(slice_, dim, span, f"does not begin and end at a multiple of {of}, where GPTQ can be cut")
    prefix = slice_.name.removesuffix("weight")
    groups = _divided(columns, group_size)
    return GptqTensors(
        codes=_part(f"{prefix}qweight", (num_columns // codes_a_word, num_rows), _divided(columns, codes_a_word), rows),
        zeros=_part(
            f"{prefix}qzeros",
            (num_columns // group_size, num_rows // codes_a_word), groups, _divided(rows, codes_a_word),
        ),
        scales=_part(f"{prefix}scales", (num_columns // group_size, num_rows), groups, rows),
        groups=_part(f"{prefix}g_idx", (num_columns,), columns),
    )  # fmt: skip


def checkpoint_tensors(
    slices: Sequence[TensorSlice], linear: LinearFormat | None
) -> Iterator[tuple[TensorSlice, tuple[str, ...]]]:
    """Yields the tensors that the checkpoint must have for the slices, each with the number types that it may have.

    The number types are named as safetensors names them.
    """
    for slice_ in slices:
        if linear is None or linear.gptq is None or not is_layer_weight(slice_):
            yield slice_, _FLOATS
            continue
        tensors = gptq_tensors(slice_, linear)
        yield tensors.scales, _FLOATS
        for part in (tensors.codes, tensors.zeros, tensors.groups):
            yield part, _INTEGERS


def _part(name: str, shape: tuple[int, ...], *spans: Span) -> TensorSlice:
    return TensorSlice(name=name, shape=shape, spans=spans)


def _divided(span: Span, size: int) -> Span:
    return Span(span.start // size, span.stop // size)


def _bad_cut(slice_: TensorSlice, dim: str, span: Span, problem: str) -> InvalidModel:
    return InvalidModel(
        field=f"{slice_.name}: {dim}",
        value=f"{span.start} to {span.stop}",
        problem=problem,
        fix="Give the layer to one rank, or cut it elsewhere.",
    )
