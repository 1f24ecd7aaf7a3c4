"""How numbers are held, as messages of the worker protocol. Pure."""

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
    """The message of a number type."""
    return _DTYPES[dtype]


def read_dtype(message: pb.Dtype.ValueType) -> DType:
    """The number type in a message. Raises InvalidRequest for one that is not known."""
    for dtype, known in _DTYPES.items():
        if message == known:
            return dtype
    fix = "Use DTYPE_FLOAT32 or DTYPE_BFLOAT16."
    raise InvalidRequest(field="dtype", value=message, problem="is not known", fix=fix)


def quantization_message(quantization: Quantization) -> pb.Quantization.ValueType:
    """The message of how linear layers are rounded."""
    return _QUANTIZATIONS[quantization]


def read_quantization(message: pb.Quantization.ValueType) -> Quantization:
    """How linear layers are to be rounded. Raises InvalidRequest for a way that is not known."""
    for quantization, known in _QUANTIZATIONS.items():
        if message == known:
            return quantization
    fix = "Use QUANTIZATION_UNSPECIFIED, _INT8 or _INT4."
    raise InvalidRequest(field="quantization", value=message, problem="is not known", fix=fix)
