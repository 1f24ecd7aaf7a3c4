"""Converts number types and quantizations to messages of the worker protocol and back. Pure."""

from placement.errors import InvalidRequest
from placement.model.quantization import Quantization
from placement.model.specs import DType
from protos.heterodyne.worker.v1 import worker_pb2 as pb

_DTYPES = {DType.FLOAT32: pb.DTYPE_FLOAT32, DType.BFLOAT16: pb.DTYPE_BFLOAT16}
_QUANTIZATIONS = {
    Quantization.NONE: pb.QUANTIZATION_UNSPECIFIED,
    Quantization.INT8: pb.QUANTIZATION_INT8,
    Quantization.INT4: pb.QUANTIZATION_INT4,
}


def dtype_message(dtype: DType) -> pb.Dtype.ValueType:
    """Returns the message of a number type."""
    return _DTYPES[dtype]


def read_dtype(message: pb.Dtype.ValueType) -> DType:
    """Returns the number type in a message. Raises InvalidRequest for an unknown one."""
    for dtype, known in _DTYPES.items():
        if message == known:
            return dtype
    fix = "Use DTYPE_FLOAT32 or DTYPE_BFLOAT16."
    raise InvalidRequest(field="dtype", value=message, problem="is not known", fix=fix)


def quantization_message(quantization: Quantization) -> pb.Quantization.ValueType:
    """Returns the message of a quantization."""
    return _QUANTIZATIONS[quantization]


def read_quantization(message: pb.Quantization.ValueType) -> Quantization:
    """Returns the quantization in a message. Raises InvalidRequest for an unknown one."""
    for quantization, known in _QUANTIZATIONS.items():
        if message == known:
            return quantization
    fix = "Use QUANTIZATION_UNSPECIFIED, _INT8 or _INT4."
    raise InvalidRequest(field="quantization", value=message, problem="is not known", fix=fix)
